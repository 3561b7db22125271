"""The mask of ZZQ987/Video-o3-Qwen3VL, from token ids; an official row without keys is uniform in a softmax."""

from typing import Any

import jax

from attnlab.interop.official import Given, Inputs, Official, Only, options
from attnlab.nn.task_decoupled_masking import Tags, roles_from_tokens, task_decoupled_mask

_SEQUENCES = ("answer_start", "answer_end", "grounding_start", "grounding_end")


def _mask(function: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    tags: dict[str, Any] = {name: tuple(given[f"{name}_ids"]) for name in _SEQUENCES if f"{name}_ids" in given}
    tags |= {name: given[f"{name}_id"] for name in ("vision_start", "vision_end") if f"{name}_id" in given}
    roles = roles_from_tokens(inputs["input_ids"], inputs.get("labels"), tags=Tags(**tags), gap=given["gap_threshold"])
    rules = {
        "answer": given["mask_answer_from_first_video"],
        "grounding": given["mask_grounding_from_other_videos"],
    }
    return {"mask": function(roles, inputs["attention_mask"] >= 1, **rules)}


_READ = ("mask_answer_from_first_video", "mask_grounding_from_other_videos", "gap_threshold")
_READ += ("vision_start_id", "vision_end_id", *(f"{name}_ids" for name in _SEQUENCES))

OFFICIAL = [
    Official(
        "convert_2d_to_4d_attention_mask",
        task_decoupled_mask,
        # What the call reads itself.
        options(**dict.fromkeys(_READ), ignore_index=Only(-100)),
        call=_mask,
        defaults={
            "mask_answer_from_first_video": False,
            "mask_grounding_from_other_videos": False,
            "gap_threshold": 30,
        },
    )
]
