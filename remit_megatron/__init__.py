"""RL-guided mid-training (ReMiT, arXiv 2602.03075) on Megatron-Core."""

__version__ = "0.1.0"
