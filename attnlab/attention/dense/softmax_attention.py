"""Softmax attention (Vaswani et al., 2017, arXiv:1706.03762, section 3.2).

    q, k, v = x W_q, c W_k, c W_v             c the context; x itself in self-attention
    y = concat_h(softmax(q_h k_hᵀ / √D) v_h) W_o

What later work added is optional: grouped key and value heads (Ainslie et al., 2023, arXiv:2305.13245), normed queries
and keys (Dehghani et al., 2023, arXiv:2302.05442; RMSNorm here), rotary positions (Su et al., 2021, arXiv:2104.09864)
along one, two or three axes, and ALiBi (Press et al., 2022, arXiv:2108.12409). Cost O(N·M·(D+E)) per head. Where the
paper masks by -∞, a query without any key gives zeros.

The operator is `attnlab.nn.softmax.softmax_attention`.
"""

from typing import Any

from flax import nnx

from attnlab.nn.projected_mixer import ProjectedMixer
from attnlab.nn.rotary import Rotary
from attnlab.nn.softmax_core import SoftmaxCore
from attnlab.registry import Cost, Paper, Source, register
from pallas_kernels.masks import Mask


@register(
    "softmax_attention",
    paper=Paper("Attention Is All You Need", "Vaswani et al.", 2017, arxiv="1706.03762"),
    source=Source.PAPER_TEXT,
    cost=Cost(time="O(N·M·H·(D+E))", memory="O(N·M·H), with block_size O(N·H·(D+E))", state="M·G·(D+E)"),
    summary="every query weighs every value by the softmax of its scaled products with the keys",
)
class SoftmaxAttention(ProjectedMixer):
    """Tokens of any layout to the same shape; see the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: query heads H.
      rotary: rotary positions along the axes of the layout, or theta for `Rotary(theta)`.
      rotate_keys: whether `rotary` turns keys too, not queries alone.
      alibi: whether scores fall with the distance; for sequences.
      structural_mask: a rule on indices, such as `pallas_kernels.masks.SlidingWindow(127, 0)`.
      scale: of the scores; D^-1/2 when None.
      softcap: bound of the scores by tanh; none when None.
      attention_dropout: rate on the weights.
      block_size: queries per block, for memory linear in N and M; when None, all at once, but for long sequences on a
        CPU.
      kernel: `pallas_kernels.block_sparse_attention` where it takes the call, whose cost follows the blocks that rules
        and segments leave: "auto", or the name of an implementation; dense attention when None.
      rngs: streams `params`, and `dropout` if there is any.
      **projections: sizes and biases of the projections, pattern and layout: see `ProjectedMixer`.

    Raises:
      ValueError: for sizes that do not fit, or options that exclude each other.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        rotary: Rotary | float | None = None,
        rotate_keys: bool = True,
        alibi: bool = False,
        structural_mask: Mask | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        attention_dropout: float = 0.0,
        block_size: int | None = None,
        kernel: str | None = None,
        rngs: nnx.Rngs,
        **projections: Any,
    ):
        super().__init__(features, num_heads=num_heads, **projections, rngs=rngs)
        self.set_core(
            SoftmaxCore(
                num_heads,
                rotary=rotary,
                rotate_keys=rotate_keys,
                alibi=alibi,
                structural_mask=structural_mask,
                scale=scale,
                softcap=softcap,
                dropout=attention_dropout,
                block_size=block_size,
                kernel=kernel,
                rngs=rngs,
            )
        )
