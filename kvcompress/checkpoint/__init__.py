"""Model directories as input. Only this package loads models, their settings and tokenizers."""
