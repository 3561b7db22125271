"""Local attention of a sequence (Luong et al., EMNLP 2015, arXiv:1508.04025), as the benchmark CAB (Zhang et al., ICML
2023, arXiv:2210.07661) has it: softmax attention to the tokens near by.

    y_i = softmax_j(q_i·k_j D^-1/2) v_j,   |i - j| ≤ w,   or causal  i - w < j ≤ i

2w + 1 keys, or causal w. Cost O(N·w·(D+E)) per head on `block_sparse_attention`, whose cost follows the mask. CAB's
code masks a key beyond the sequence's ends only where the end itself is padding, if there is padding at all; here such
keys do not exist.

Code: Shark-NLP/CAB.
"""

from typing import Any

from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.contract import Layout, Pattern
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.masks import SlidingWindow


@register(
    "cab.local",
    paper=Paper(
        "Effective Approaches to Attention-based Neural Machine Translation",
        "Luong et al.",
        2015,
        arxiv="1508.04025",
    ),
    source=Source.AUTHORS_CODE,
    repository="Shark-NLP/CAB",
    cost=Cost(time="O(N·w·H·(D+E))", memory="O(N·H·(D+E))", state="N·H·(D+E)"),
    kernel="block_sparse_attention",
    summary="softmax attention to the tokens near by, in a sliding window",
    small={"window": 3, "kernel": None},
)
class LocalAttention(SoftmaxAttention):
    """Tokens (B, N, C) to (B, N, C). See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      window: w: keys on each side, or causal keys with the query's own.
      causal: whether token i sees tokens up to i only.
      kernel: as in `SoftmaxAttention`.
      rngs: streams `params`, and `dropout` if there is any.
      **options: further arguments of `SoftmaxAttention`.

    Raises:
      ValueError: for sizes that do not fit.
    """

    patterns = frozenset({Pattern.SELF, Pattern.CAUSAL_SELF})
    layouts = frozenset({Layout.SEQUENCE})

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        window: int = 15,
        causal: bool = False,
        kernel: str | None = "auto",
        rngs: nnx.Rngs,
        **options: Any,
    ):
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        rule = SlidingWindow(window - 1, 0) if causal else SlidingWindow(window, window)
        own = {"structural_mask": rule, "kernel": kernel, "causal": causal}
        super().__init__(features, num_heads=num_heads, **own, **options, rngs=rngs)
        self.window = window
