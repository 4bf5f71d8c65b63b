"""Model directories as input: the one place where a model, its settings or tokenizer are loaded."""
