"""One training step and what is around it: the command, the engine inside Megatron's loop, metrics."""
