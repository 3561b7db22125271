"""Attention to a choice of tokens or blocks that depends on their content."""
