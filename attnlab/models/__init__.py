"""Models that take any registered mixer, and the backbones of the papers: `create(name, num_classes=…)`."""

from attnlab.models.zoo import create, named_models

__all__ = ["create", "named_models"]
