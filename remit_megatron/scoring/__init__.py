"""Scores and log-probabilities of texts, forward only."""
