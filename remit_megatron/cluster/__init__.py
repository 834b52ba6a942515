"""What a run needs of a cluster, before it has one.

command     remit plan
planner     memory and time of one layout, by arithmetic         (state, activations, timing, reference)
search      the layouts of a number of GPUs, and the fastest one that fits
run_layouts which of them the run takes, its own among them       (what_would: where it takes none)
simulate    the real model and optimizer on `meta`, as one rank of a world that does not exist
inventory   the sizes of a model's parameters, which the arithmetic starts from
"""
