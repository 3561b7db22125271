"""Sparse query attention (2025, arXiv:2510.01817; code: RxAI-dev/RxNN).

Softmax attention with fewer query heads than its head size was made for. H nominal heads fix the size D = C / H; Hq of
them are kept as queries, which read G key heads, G a divisor of Hq:

    q = x W_q  (B, N, Hq, D)        k, v = c W_k, c W_v  (B, M, G, D)
    y = concat_h(softmax(q_h k_gᵀ / √D) v_g) W_o        g = h // (Hq / G),  W_o (Hq·D, C)

Scores and sums over values cost Hq / H of multi-head attention's, in training and prefill; a cache of keys is that of
grouped-query attention with the same G. The paper names choices of sizes: SQA Hq = H/2, G < Hq; sSQA Hq = G = H/2;
xSQA Hq ≤ H/4; xSMQA few Hq, G = 1. The authors' code calls Hq `num_query_groups` and G `num_groups`.
"""

from typing import Any

from flax import nnx

from attnlab.attention.dense.softmax_attention import SoftmaxAttention
from attnlab.registry import Cost, Paper, Source, register


@register(
    "sqa",
    paper=Paper(
        "Sparse Query Attention (SQA): A Computationally Efficient Attention Mechanism with Query Heads Reduction",
        "Filipek",
        2025,
        arxiv="2510.01817",
        number=52,
    ),
    source=Source.AUTHORS_CODE,
    repository="RxAI-dev/RxNN",
    cost=Cost(time="O(N·M·Hq·D)", memory="O(N·M·Hq), with block_size O(N·Hq·D)", state="M·G·D"),
    summary="softmax attention with some of the query heads alone, and the head size of all",
)
class SparseQueryAttention(SoftmaxAttention):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: nominal heads H.
      num_query_heads: query heads Hq that are kept; half of H when None.
      num_kv_heads: key and value heads G, a divisor of Hq; Hq when None (sSQA).
      qkv_bias: whether the maps to queries, keys and values have a bias.
      rngs: streams `params`, and `dropout` if there is any.
      **options: those of `SoftmaxAttention`, but for `head_dim`, which is C / H.

    Raises:
      ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        num_query_heads: int | None = None,
        num_kv_heads: int | None = None,
        qkv_bias: bool = False,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        kept = max(num_heads // 2, 1) if num_query_heads is None else num_query_heads
        if features % num_heads or not 1 <= kept <= num_heads:
            raise ValueError(
                f"num_heads {num_heads} must divide the {features} channels, and num_query_heads {kept} be 1 to as many"
            )
        super().__init__(
            features,
            num_heads=kept,
            num_kv_heads=num_kv_heads,
            head_dim=features // num_heads,
            qkv_bias=qkv_bias,
            rngs=rngs,
            **options,
        )
