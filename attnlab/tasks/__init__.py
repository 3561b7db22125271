"""Synthetic tasks with an oracle that solves them: recall, in-context regression, planted events."""
