"""What the generators of pages share: words, plots, and the files that they write."""
