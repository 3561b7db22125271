"""Attention of nodes to their neighbours in a graph."""
