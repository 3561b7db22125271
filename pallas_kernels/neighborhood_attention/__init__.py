"""Neighborhood attention in 1, 2 or 3 axes, never building the N×N matrix. See `api` for the contract."""

from pallas_kernels.neighborhood_attention.api import (
    explain,
    neighborhood_attention,
    neighborhood_attention_weights,
    neighborhood_mask,
)
from pallas_kernels.neighborhood_attention.weighted_sum import neighborhood_places, neighborhood_sum
from pallas_kernels.neighborhood_attention.windows import Window

__all__ = [
    "Window",
    "explain",
    "neighborhood_attention",
    "neighborhood_attention_weights",
    "neighborhood_mask",
    "neighborhood_places",
    "neighborhood_sum",
]
