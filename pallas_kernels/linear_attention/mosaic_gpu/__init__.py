"""Linear attention in Pallas for Hopper: see `op`."""
