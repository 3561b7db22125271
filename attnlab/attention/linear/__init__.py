"""Attention linear in the number of tokens: the keys and values are summed into a state."""
