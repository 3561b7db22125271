"""LSSA and LSSAR: the functions of a third-party implementation."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax

from attnlab.attention.dense.lssar import softplus_attention
from attnlab.interop.official import Official, options


def _call(attend: Callable[..., Any], inputs: dict[str, jax.Array], given: Mapping[str, Any]) -> dict[str, jax.Array]:
    return dict(zip(("y", "attn"), attend(**inputs), strict=True))


_OPTIONS = options("eps", "reweight", p="power", n_zero_offset_rows="free_keys", phi="positive")
OFFICIAL = [
    Official("lssa_attention", functools.partial(softplus_attention, reweight=False), _OPTIONS, call=_call),
    Official("lssar_attention", softplus_attention, _OPTIONS, call=_call),
]
