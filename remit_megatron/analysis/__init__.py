"""What a run is worth, to look at: analyses of real checkpoints and text, and the report. Hugging Face models and files
only; no Megatron.
"""
