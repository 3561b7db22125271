"""Losses on attention and on tokens."""
