"""Attentive poolings: tokens to one vector."""
