"""Attention to the surroundings of a token: windows, stripes, neighbourhoods."""
