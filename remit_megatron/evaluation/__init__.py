"""What a model is worth: suites of tasks on lm-eval, and comparisons of results. Hugging Face models and files only."""
