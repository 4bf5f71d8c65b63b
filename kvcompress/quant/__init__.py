"""KV codes, key constants and weight formats."""
