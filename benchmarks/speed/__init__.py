"""What the speed benchmarks share beside `kvcompress.bench`: the model, the rivals, the page."""
