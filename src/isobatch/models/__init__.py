"""Model definitions, and everything that comes from a checkpoint: configuration, names, weights."""
