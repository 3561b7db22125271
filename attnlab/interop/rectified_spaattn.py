"""BienLuky/Rectified-SpaAttn, functions without weights: of a video alone (Wan), and with text (HunyuanVideo)."""

from typing import Any

import jax

from attnlab.interop.official import Given, Inputs, Official, Only, options
from attnlab.interventions.rectified_spaattn import rectified_sparse_attention

_CONFIG = options(
    "top_k",
    "first_frame_blocks",
    block_size_M="block_q",
    block_size_N="block_k",
    p_remain_rates="share",
    prob_threshold="share",
)


def _video(attend: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    found = attend(*(inputs[name] for name in "qkv"), inputs.get("block_neighbor"))
    masks = {"critical_mask": found.critical, "gain_mask": found.gain}
    return {"y": found.y, "pooled_probs": found.probabilities, **masks}


def _with_text(attend: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    found = attend(*(inputs[name] for name in "qkv"), inputs.get("block_neighbor"), num_text=given["valid_text"])
    masks = {"critical_mask": found.critical, "gain_mask": found.gain}
    y = found.y[:, : given["visual_tokens"] + given["valid_text"]]
    return {"y": y, "realloc_probs": found.probabilities, **masks}


OFFICIAL = [
    Official(
        "rectified_block_sparse_attention",
        rectified_sparse_attention,
        _CONFIG | options(text=Only(False)),
        call=_video,
    ),
    Official(
        "block_sparse_attention_combined",
        rectified_sparse_attention,
        _CONFIG | options("text_slots", visual_tokens=None, valid_text=None),
        call=_with_text,
    ),
]
