"""Measures of attention: sinks, entropy, distances, importance of heads."""
