"""Delta rule attention in Pallas for TPU: see `op`."""
