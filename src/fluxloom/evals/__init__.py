"""Suites that count how often a model does what it was asked, judged by a reader that had no part in its training."""
