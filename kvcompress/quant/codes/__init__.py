"""Ways to code a vector, one a file."""
