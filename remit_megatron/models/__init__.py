"""Model families: architecture, layer specs, names of weights, conversion."""
