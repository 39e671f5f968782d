"""Executors: the same velocity from the same weights, another way. Nothing below knows of them."""
