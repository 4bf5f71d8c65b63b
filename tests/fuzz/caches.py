"""Mutants of saved caches: each is sealed with the digest that its bytes have, loaded, and decoded on."""
