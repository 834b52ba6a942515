"""Hugging Face models to Megatron checkpoints and back, and the loading of weights."""
