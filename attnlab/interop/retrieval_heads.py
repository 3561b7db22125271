"""Retrieval scores of nightdessert/Retrieval_Head, which have no weights; one prompt in all runs."""

from typing import Any

import jax

from attnlab.analysis.retrieval_heads import retrieval_scores
from attnlab.interop.official import Given, Inputs, Official, options


def _scores(scores: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    found = scores(inputs["attn"], inputs["generated"], inputs["prompt_ids"], inputs["needle_ids"])
    return {"score": found.score, "score_per_run": found.per_run, "needle_span": found.span[0]}


OFFICIAL = [
    Official(
        "LLMNeedleHaystackTester",
        retrieval_scores,
        # Where the needle was put is found again.
        options("topk", needle_start=None, needle_len=None),
        call=_scores,
    )
]
