"""Training-free edits of attention at inference."""
