"""A run as its configuration says it: read, checked, opened (samples, score cache, directory)."""
