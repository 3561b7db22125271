"""Models that take any registered mixer, and the backbones of the papers."""
