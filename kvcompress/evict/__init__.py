"""Choosing the tokens to keep: scorers and the keep rule."""
