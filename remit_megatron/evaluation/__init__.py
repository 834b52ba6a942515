"""What a model is worth: suites of tasks. Sees Hugging Face models and files only."""
