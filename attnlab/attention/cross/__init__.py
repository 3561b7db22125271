"""Attention of tokens to another sequence, set or memory."""
