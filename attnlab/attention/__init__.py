"""Attention mechanisms, one file each, in families."""
