"""Block-sparse attention on TPU: a grid over the list of visited tiles."""
