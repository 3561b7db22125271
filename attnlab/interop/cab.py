"""CAB, the comprehensive attention benchmark: Shark-NLP/CAB, the attentions of `efficient-attention` and the index.

Padding is laid out there in ways of their own. cosFormer and ProbSparse ignore it. Performer, LARA and Nyström repeat
the mask head by head for heads that stand example by example, so that head h of example b gets the padding of example
(bH + h) mod B, and Performer's maximum, LARA's normaliser and the segments of both others count padding. All of this
is said here, for the golden numbers; the modules mask what does not exist.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.analysis.cab import CompositionalIndex, compositional_index
from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.attention.linear.abc import BoundedMemoryAttention
from attnlab.attention.linear.cosformer import CosformerAttention
from attnlab.attention.linear.lara import LinearRandomizedAttention, lara_features
from attnlab.attention.linear.nystrom import NystromAttention
from attnlab.attention.linear.performer import Performer, key_features, query_features
from attnlab.attention.local.cab_local import LocalAttention
from attnlab.attention.sparse.long_short import LongShortAttention
from attnlab.attention.sparse.prob_sparse import ProbSparseAttention
from attnlab.interop.names import Mapped
from attnlab.interop.official import ConfigError, Given, Inputs, Official, Only, options
from attnlab.nn.clamped_mixer import clamped_linear_attention
from attnlab.nn.dense_mixer import Heads
from pallas_kernels.linear_attention import linear_attention

_PADDING = "key_padding_mask"


def _masked(module: Any, inputs: Inputs, given: Given) -> jax.Array:
    mask = None if inputs.get(_PADDING) is None else inputs[_PADDING] == 0
    return module(inputs["query"], inputs.get("key"), mask=mask)


def _unmasked(module: Any, inputs: Inputs, given: Given) -> jax.Array:
    return module(inputs["query"], inputs.get("key"))


def _read(inputs: Inputs, heads: int) -> jax.Array | None:
    """Keys `(B, M, H)` that each head reads there."""
    if inputs.get(_PADDING) is None:
        return None
    real = inputs[_PADDING] == 0
    batch = real.shape[0]
    row = (np.arange(batch)[:, None] * heads + np.arange(heads)) % batch
    return real[row].swapaxes(1, 2)


def _heads(module: Any, inputs: Inputs) -> Heads:
    source = inputs.get("key", inputs["query"])
    return Heads(module.query(inputs["query"]), module.key(source), module.value(source))


def _performer(module: Performer, inputs: Inputs, given: Given) -> jax.Array:
    heads, rows, read = _heads(module, inputs), module.rows[...], _read(inputs, module.num_heads)
    q = query_features(heads.q, rows, eps=module.eps)
    k, _, _ = key_features(heads.k, rows, eps=module.eps)
    k = k if read is None else jnp.where(read[..., None], k, 0)
    return module.out(clamped_linear_attention(q, k, heads.v, least=module.least))


def _lara(module: LinearRandomizedAttention, inputs: Inputs, given: Given) -> jax.Array:
    heads, read = _heads(module, inputs), _read(inputs, module.num_heads)
    q, k = lara_features(heads.q, heads.k, num_landmarks=module.num_landmarks, real=read, padding_counts=True)
    return module.out(linear_attention(q, k, heads.v, causal=False))


def _nystrom(module: NystromAttention, inputs: Inputs, given: Given) -> jax.Array:
    heads = _heads(module, inputs)
    return module.out(module.attend_to(heads, _read(inputs, module.num_heads), padding_counts=True))


def _prob_sparse(module: ProbSparseAttention, inputs: Inputs, given: Given) -> jax.Array:
    heads = _heads(module, inputs)
    samples = inputs.get("index_sample", module.samples(heads.q.shape[1]))
    return module.out(module.attend_by(heads, samples))


def _index(function: Any, inputs: Inputs, given: Given) -> dict[str, Any]:
    """Indices as they are printed, in four decimals, of metrics that are read from decimals: so in float64."""
    found: dict[str, Any] = {}
    for place, pattern in enumerate(given["patterns"]):
        with jax.enable_x64(True):
            metrics = np.array([float(str(value)) for value in np.asarray(inputs[f"metrics_{place}"])], np.float64)
            its: CompositionalIndex = function(metrics, pattern=pattern.lower())
            found[f"task_{place}"], found[f"total_{place}"] = (np.round(np.asarray(each), 4) for each in its)
    return found


def _same_width(given: Given) -> dict[str, Any]:
    for name in ("kdim", "vdim"):
        if given.get(name) not in (None, given["embed_dim"]):
            raise ConfigError(f"{name} must be embed_dim here: the code refuses keys of another width, too")
    return {}


def _head_dim(given: Given) -> dict[str, Any]:
    if given["head_dim"] not in (None, given["embed_dim"] // given["num_heads"]):
        raise ConfigError("head_dim must be embed_dim / num_heads: the code's norms and last map need it")
    return {}


def _conv(given: Given) -> dict[str, Any]:
    size = given["conv_kernel_size"]
    return {"conv_size": size if size is not None and size > 0 else None}


def _causal(given: Given) -> dict[str, Any]:
    """Slots of a context are whole, in a decoder too."""
    return {"causal": bool(given["causal"]) and not given.get("cross")}


def _sizes(given: Given) -> dict[str, Any]:
    return {"head_dim": given.get("d_keys") or None, "value_dim": given.get("d_values") or None}


_CALL = options(batch_first=None, cross=None, key_padding=None, training=Only(False), name=None)
_USUAL = _CALL | options(embed_dim="features", bias="qkv_bias", add_bias_kv=Only(False), add_zero_attn=Only(False))
_USUAL |= {"kdim": _same_width, "vdim": _same_width}
_BIASES = _USUAL | {"bias": lambda given: {"qkv_bias": given["bias"], "out_bias": given["bias"]}}
_ONE_BIAS = _USUAL | {"bias": Only(True)}
_SELF = _ONE_BIAS | options(causal=Only(False), cross=Only(False))
_PROJECTED = {name: f"{name[0]}_proj" for name in ("query", "key", "value")} | {"out": "out_proj"}
_ABC = _PROJECTED | {"key_control": "compress_k", "value_control": "compress_v"}
_LOCAL = _BIASES | options(wsize="window", cross=Only(False))
_COSFORMER = _CALL | {"embed_dim": "features", "kdim": _same_width, "vdim": _same_width, "has_outproj": Only(True)}
_COSFORMER |= {"act_fun": Only("relu"), "causal": Only(False)}
_CONV = {
    "conv.kernel": Mapped("conv.weight", lambda weight: weight[:, 0, :, 0].T, lambda kernel: kernel.T[:, None, :, None])
}
_LS = _CALL | options(embed_dim="features", window_size="window", conv_kernel_size=_conv, head_dim=_head_dim, fp32=None)
_LS |= options(causal=Only(False), cross=Only(False))
_LS_NAMES = {"query": "W_q", "key": "W_k", "value": "W_v", "out": "W_o", "summary": "dconv_fc"}
_LS_NAMES |= {"norm": "dual_ln_l", "summary_norm": "dual_ln_s"} | _CONV
_PROB = _CALL | options(embed_dim="features", mix="mix_heads", output_attention=None, d_keys=_sizes, d_values=_sizes)
_PROB |= options(causal=Only(False), cross=Only(False), mask_flag=None)
_PROB_NAMES = {name: f"{name}_projection" for name in ("query", "key", "value", "out")}
_DRAWN = ("index_sample",)

OFFICIAL = [
    Official("MultiheadAttention", SoftmaxAttention, _BIASES, _PROJECTED, _masked),
    Official("LocalAttention", LocalAttention, _LOCAL, _PROJECTED, _masked),
    Official(
        "ABC",
        BoundedMemoryAttention,
        _ONE_BIAS | {"num_landmarks": "num_slots", "causal": _causal},
        _ABC,
        _masked,
        always={"accumulate": False},
    ),
    Official("CosformerAttention", CosformerAttention, _COSFORMER, _PROJECTED, _unmasked),
    Official(
        "Performer",
        Performer,
        _ONE_BIAS | {"approx_attn_dim": "num_features", "causal": None},
        _PROJECTED | {"rows": "eval_proj"},
        _performer,
    ),
    Official("Lara", LinearRandomizedAttention, _SELF, _PROJECTED, _lara),
    Official(
        "NystromAttention",
        NystromAttention,
        _SELF | {"conv_kernel_size": _conv},
        _PROJECTED | _CONV,
        _nystrom,
        always={"shared_start": True},
    ),
    Official("AttentionLS", LongShortAttention, _LS, _LS_NAMES, _masked),
    Official("ProbSparse", ProbSparseAttention, _PROB, _PROB_NAMES, _prob_sparse, ignore=_DRAWN),
    Official("get_ci", compositional_index, options(patterns=None, tasks=None), call=_index),
]
