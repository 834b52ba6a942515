"""Post-training: supervised fine-tuning, preferences, reinforcement learning with verifiable rewards."""
