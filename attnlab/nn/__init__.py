"""Parts that many mixers share: projections, norms, positions, grids, feature maps, attention with softmax."""
