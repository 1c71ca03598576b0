"""Regularization: terms that hold important weights where they are."""
