"""What a decode step costs here: beside transformers' own caches and the floor of memory."""
