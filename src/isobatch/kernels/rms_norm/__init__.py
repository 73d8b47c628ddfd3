"""RMS norm, with and without the residual addition before it."""
