"""Evaluations and comparisons in the formats that other tools read."""
