"""attnlab: the attention mechanisms of the research literature as Flax NNX modules.

Every mechanism is a pure function and a module around it, checked against its authors' numbers:

    from flax import nnx
    import attnlab

    attnlab.names()                                            # the registered variants
    mixer = attnlab.create("agent_attention", attnlab.Site(features=64, num_heads=4, layout=attnlab.Layout.IMAGE,
                                                           grid=(8, 8)), rngs=nnx.Rngs(0))
"""

from attnlab.contract import Layout, Pattern, Pooling, Site, TokenMixer, UnsupportedArgument, record
from attnlab.registry import Cost, Example, Kind, Paper, Source, Variant, create, get, names, register, variants

__version__ = "0.2.0"

__all__ = [
    "Cost",
    "Example",
    "Kind",
    "Layout",
    "Paper",
    "Pattern",
    "Pooling",
    "Site",
    "Source",
    "TokenMixer",
    "UnsupportedArgument",
    "Variant",
    "create",
    "get",
    "names",
    "record",
    "register",
    "variants",
]
