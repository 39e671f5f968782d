"""From bytes to modules and back: how tensors are named, stored and loaded."""
