"""How fast it is here: one step, one picture, loading, the peers side by side, and the floor of the machine."""
