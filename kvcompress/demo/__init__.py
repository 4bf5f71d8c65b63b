"""The shipped model, and the main job run on it from end to end."""
