"""Rounds: train, evaluate, post-train, report."""
