"""Corpora to token files, token files to samples."""
