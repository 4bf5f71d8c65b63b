"""What to keep: scorers and the keep rule."""
