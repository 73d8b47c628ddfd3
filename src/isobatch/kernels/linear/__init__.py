"""Linear: y = x W^T (+ bias)."""
