"""Ranks, files, launch, checkpoints, progress, errors: what every room stands on. No model code."""
