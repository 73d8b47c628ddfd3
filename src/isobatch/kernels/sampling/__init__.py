"""Choosing a token from a row of logits: penalties, filters, counter-based noise."""
