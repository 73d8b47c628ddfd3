"""Embedding: rows of a weight matrix, copied."""
