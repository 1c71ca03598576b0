"""Baselines: what a method is held against."""
