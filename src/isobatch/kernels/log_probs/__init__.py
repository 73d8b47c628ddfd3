"""Log-probabilities of logits: the chosen token's, its rank, and the top few."""
