"""Attention between tokens of several modalities."""
