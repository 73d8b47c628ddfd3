"""Mixture of experts: each token is served by a few of many MLPs."""
