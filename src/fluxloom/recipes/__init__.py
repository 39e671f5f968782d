"""Runs as plain Python: what made the data and the models that ship with the package."""
