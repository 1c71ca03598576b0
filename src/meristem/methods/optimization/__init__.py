"""Optimization: how the weights move, whatever the loss."""
