"""Linear attention in Pallas for TPU: see `op`, and `step` for decoding."""
