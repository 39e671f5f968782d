"""Editing pictures with care: what an instruction leaves alone stays as it was, and no step is lost."""
