"""Linear attention in Triton: see `op`."""
