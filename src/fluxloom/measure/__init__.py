"""Judging pictures without a human: an independent recogniser of the illustrated world."""
