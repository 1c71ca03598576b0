"""Architecture: parameters of their own for what is new."""
