"""A2Mamba: LMMMEng/A2Mamba, models/a2mamba.py.

model = staged.build_named(A2MAMBAS, "a2mamba_tiny", rngs=nnx.Rngs(0))
attnlab.interop.load(model, "a2mamba_tiny.pth")
"""

from typing import Any

from flax import nnx

from attnlab.attention.local.a2mamba import AttentionAugmentedScan, NeighborhoodScanAttention
from attnlab.contract import Layout, Site
from attnlab.interop.names import Name, Part, Squeezed
from attnlab.interop.official import ConfigError, Given, Official, Only, options, pair
from attnlab.models.a2mamba import BLOCK, A2Mamba
from attnlab.models.block import Block
from attnlab.models.staged import Choice, Place, transformer_block


def _alone(base: str) -> Name:
    """A parameter of one route, which has no axis for it there."""
    return Name(base, there=lambda a: a[0])


_SCAN: dict[str, Any] = {
    "conv": "conv2d",
    "scan.inputs": _alone("x_proj_weight"),
    "scan.step": _alone("dt_projs_weight"),
    "scan.step_bias": _alone("dt_projs_bias"),
    "scan.log_rates": _alone("A_logs"),
    "scan.skip": _alone("Ds"),
    "fusion": Squeezed("state_fusion", 2, 3),
}
_TABLE = ("*rope.angle", "*rpb.1")  # the second bias is the first


def _mixer_names(mixer: NeighborhoodScanAttention) -> dict[Any, Any]:
    names: dict[Any, Any] = {
        ("query", "key", "value"): Squeezed("qkv", 2, 3),
        "gate.conv": "gate.0",
        "gate.norm": "gate.1",
        "local": "lepe",
        "norm": "norm",
        "last_norm": "proj.0",
        "out": Squeezed("proj.1", 2, 3),
    }
    names |= {} if mixer.scan is None else {"scan": Part("ssm", _SCAN)}
    names |= {} if mixer.bias is None else {"bias": "rpb.0"}
    return names | ({} if mixer.pair_bias is None else {"pair_bias": Squeezed("rpb.2", 0)})


def _grid(given: Given) -> dict[str, Any]:
    return {} if given["image_size"] is None else {"bias_grid": pair(given["image_size"])}


_ATTENTION = options(
    "num_heads",
    embed_dim="features",
    window_size="kernel_size",
    window_dilation="dilation",
    global_mode="whole",
    use_rpb="relative_bias",
    image_size=_grid,
    sr_ratio=None,
    pos_enc=None,
)
_GIVEN = {"window_size": 7, "window_dilation": 1, "global_mode": False, "image_size": None, "use_rpb": False}
_MIXER = Official("Attention", NeighborhoodScanAttention, _ATTENTION, _mixer_names, defaults=_GIVEN, ignore=_TABLE)


def _scaling(layerscale: bool, resscale: bool, init: float) -> dict[str, Any]:
    if layerscale and resscale:
        raise ConfigError("layerscale and resscale exclude each other here, got both")
    return {"layer_scale": init if layerscale or resscale else None, "scaled": "skip" if resscale else "branch"}


def _block(
    *,
    embed_dim: int,
    num_heads: int,
    ffn_dim: int,
    layerscale: bool = False,
    resscale: bool = False,
    layer_init_values: float = 1e-5,
    rngs: nnx.Rngs,
    **attention: Any,
) -> Block:
    """A block, alone."""
    given = _MIXER.options({"embed_dim": embed_dim, "num_heads": num_heads, **attention})
    mixer = {name: value for name, value in given.items() if name not in ("features", "num_heads")}
    place = Place(Site(embed_dim, num_heads, Layout.IMAGE), 0, Choice(NeighborhoodScanAttention, mixer), 0.0)
    scaling = _scaling(layerscale, resscale, layer_init_values)
    return transformer_block(place, mlp_ratio=ffn_dim / embed_dim, **BLOCK, **scaling, rngs=rngs)


def _around(block: Block) -> dict[Any, Any]:
    names: dict[Any, Any] = {"before": "cpe1", "before2": "cpe2", "norm1": "norm1", "norm2": "norm2"}
    names |= {"mixer": Part("token_mixer", _mixer_names(block.mixer)), "mlp.conv": "mlp.dwconv"}
    names |= {f"mlp.{name}": Squeezed(f"mlp.{name}", 2, 3) for name in ("fc1", "fc2")}
    scaled = block.scale1 is not None
    return names | ({f"scale{branch}": f"layer_scale{branch}" for branch in (1, 2)} if scaled else {})


def _scales(given: Given) -> dict[str, Any]:
    stages = len(given["depths"])
    lists = [
        value if isinstance(value, list | tuple) else [value] * stages
        for value in (given["layerscales"], given["resscales"], given["layer_init_values"])
    ]
    each = [_scaling(*values) for values in zip(*lists, strict=True)]
    return {"layer_scales": [one["layer_scale"] for one in each], "scaled": [one["scaled"] for one in each]}


def _model_names(model: A2Mamba) -> dict[Any, Any]:
    names: dict[Any, Any] = {}
    for i in range(4):
        names |= {f"stem.parts.{i}.conv": f"patch_embed.{3 * i}", f"stem.parts.{i}.norm": f"patch_embed.{3 * i + 1}"}
    # Over there stages and what leads from one to the next are one list.
    names |= {
        "stage.*.down.conv": lambda i: f"layers.{2 * i - 1}.0",
        "stage.*.down.norm": lambda i: f"layers.{2 * i - 1}.1",
        "stage.*.blocks.*": lambda i, j: Part(f"layers.{2 * i}.blocks.{j}", _around(model.stage[i].blocks[j])),
        "norm.conv": Squeezed("classifier.0", 3),
        "norm.norm": "classifier.1",
        "head": Squeezed("classifier.4", 2, 3),
    }
    return names


_NET = options("num_classes", "depths", "num_heads", "projection", in_chans="channels", embed_dims="features")
_NET |= options(
    window_size="kernel_sizes",
    window_dilation=lambda given: _one_dilation(given),
    mlp_ratios="mlp_ratio",
    use_rpb="relative_bias",
    image_size="bias_size",
    layerscales=_scales,
    resscales=_scales,
    layer_init_values=_scales,
    sr_ratio=None,
    use_checkpoint=Only(0, False, [0, 0, 0, 0]),
)


def _one_dilation(given: Given) -> dict[str, Any]:
    value = given["window_dilation"]
    each = set(value) if isinstance(value, list | tuple) else {value}
    if len(each) != 1:
        raise ConfigError(f"window_dilation must be one for all stages here, got {value!r}")
    return {"dilation": each.pop()}


_NET_GIVEN = {
    "layerscales": False,
    "resscales": False,
    "layer_init_values": 1e-5,
    "window_dilation": 1,
    "use_rpb": False,
    "depths": [2, 2, 10, 2],
    "image_size": 224,
}

OFFICIAL = [
    Official(
        "A2SSM",
        AttentionAugmentedScan,
        options(d_model="features", d_state=Only(1), num_heads="fused_heads", state_params=Only(None)),
        _SCAN,
    ),
    _MIXER,
    Official("Block", _block, {}, _around, ignore=_TABLE),
    Official("A2Mamba", A2Mamba, _NET, _model_names, defaults=_NET_GIVEN, always={"image_size": None}, ignore=_TABLE),
]
