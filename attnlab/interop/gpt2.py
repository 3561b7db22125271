"""GPT-2 as openai-community publishes it, in the layout of `transformers`: GPT2LMHeadModel and GPT2Model.

The linear maps of a block are stored (in, out) there, the three to queries, keys and values side by side.
"""

from typing import Any

import jax.numpy as jnp

from attnlab.interop.names import Mapped, Name, join
from attnlab.interop.official import Official, Only, options
from attnlab.models.gpt2 import GPT2

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu", "gelu_pytorch_tanh": "gelu_tanh"}


def _turned(base: str) -> Name:
    return Mapped(base, jnp.transpose, jnp.transpose)


def gpt2_names(prefix: str) -> dict[Any, Any]:
    """The names of a GPT-2 whose parts stand under a prefix."""
    block = join(prefix, "h.*")
    return {
        "embedding": join(prefix, "wte.weight"),
        "position": join(prefix, "wpe.weight"),
        "blocks.blocks.*.norm1": f"{block}.ln_1",
        ("blocks.blocks.*.mixer.query", "blocks.blocks.*.mixer.key", "blocks.blocks.*.mixer.value"): _turned(
            f"{block}.attn.c_attn"
        ),
        "blocks.blocks.*.mixer.out": _turned(f"{block}.attn.c_proj"),
        "blocks.blocks.*.norm2": f"{block}.ln_2",
        "blocks.blocks.*.mlp.fc1": _turned(f"{block}.mlp.c_fc"),
        "blocks.blocks.*.mlp.fc2": _turned(f"{block}.mlp.c_proj"),
        "norm": join(prefix, "ln_f"),
    }


GPT2_CONFIG = options(
    "vocab_size",
    n_embd="features",
    n_layer="depth",
    n_head="num_heads",
    n_positions="max_length",
    n_ctx=None,
    n_inner="mlp_features",
    activation_function=lambda given: {"activation": ACTIVATIONS[given["activation_function"]]},
    layer_norm_epsilon="norm_eps",
    tie_word_embeddings=Only(True),
    scale_attn_weights=Only(True),
    scale_attn_by_inverse_layer_idx=Only(False),
    resid_pdrop=None,
    embd_pdrop=None,
    attn_pdrop=None,
    initializer_range=None,
    reorder_and_upcast_attn=None,
    use_cache=None,
)
# Causal masks that old files hold, and the map to logits, which is the embedding.
_CONSTANT = ("attn.bias", "attn.masked_bias", "lm_head.weight")

OFFICIAL = [
    Official("GPT2LMHeadModel", GPT2, GPT2_CONFIG, gpt2_names("transformer"), ignore=_CONSTANT),
    Official("GPT2Model", GPT2, GPT2_CONFIG, gpt2_names(""), ignore=_CONSTANT),
]
