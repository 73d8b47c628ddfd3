"""Paged causal attention, grouped-query: one order of summation for prefill, chunk and decode."""
