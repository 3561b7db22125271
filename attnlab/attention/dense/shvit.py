"""Single-head self-attention of some of the channels (SHViT, Yun and Ro, CVPR 2024, arXiv:2401.16456).

    [x₁ (P) | x₂ (C - P)] = x
    q (D), k (D), v (P) = BN(GN(x₁) W)           GN: one group, over the image and all P channels
    x₁' = softmax(q kᵀ / √D) v                   over all tokens of the image, one head
    y = BN(relu([x₁' | x₂]) W_o)

The ReLU is for the channels too that do not attend. Cost O(N²·(D+P)), P about C / 4.67 and D = 16. Reference: timm's
port of ysj9909/SHViT. The last norm's scale is zero at the start, so that the branch begins as nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, Pattern, TokenMixer, record
from attnlab.nn.chain import call
from attnlab.nn.conv import ConvNorm
from attnlab.nn.norms import BatchNorm, GroupNorm
from attnlab.nn.softmax import attention_weights, softmax_attention
from attnlab.registry import Cost, Paper, Source, register

PAPER = Paper(
    "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design",
    "Yun and Ro",
    2024,
    arxiv="2401.16456",
    number=59,
)


def single_head_attention(q: ArrayLike, k: ArrayLike, v: ArrayLike) -> jax.Array:
    """Softmax attention of one head over all tokens of an image.

    Args:
      q: queries `(B, H, W, D)`.
      k: keys `(B, H, W, D)`.
      v: values `(B, H, W, P)`.

    Returns:
      `(B, H, W, P)` in the dtype of `q`.
    """
    heads = [jnp.asarray(part).reshape(part.shape[0], -1, 1, part.shape[-1]) for part in (q, k, v)]
    return softmax_attention(*heads).reshape(jnp.shape(v))


@register(
    "shvit",
    paper=PAPER,
    source=Source.THIRD_PARTY,
    repository="huggingface/pytorch-image-models",
    cost=Cost(time="O(N²·(D+P) + N·C²)", memory="O(N²)"),
    summary="one head attends with a part of the channels, the others pass it by",
    small={"partial": 4, "key_dim": 4},
)
class SingleHeadAttention(TokenMixer):
    """Images `(B, H, W, C)` to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      partial: channels P that attend; C / 4.67 when None.
      key_dim: D, channels of queries and keys.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: unless P is at least 1 and below C.
    """

    patterns = frozenset({Pattern.SELF})
    layouts = frozenset({Layout.IMAGE})
    layout = Layout.IMAGE
    norms_its_input = True

    def __init__(
        self,
        features: int,
        *,
        partial: int | None = None,
        key_dim: int = 16,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        partial = max(round(features / 4.67), 1) if partial is None else partial
        if not 1 <= partial < features or key_dim < 1:
            raise ValueError(f"partial must be 1 to {features - 1} and key_dim at least 1, got {partial} and {key_dim}")
        self.features, self.partial, self.key_dim, self.dtype = features, partial, key_dim, dtype
        conv: dict[str, Any] = {"norm": BatchNorm, "use_bias": False, "dtype": dtype, "param_dtype": param_dtype}
        self.norm = GroupNorm(partial, 1, param_dtype=param_dtype, rngs=rngs)
        self.qkv = ConvNorm(partial, 2 * key_dim + partial, 1, axes=(None, None), **conv, rngs=rngs)
        self.out = ConvNorm(features, features, 1, **conv, rngs=rngs)
        self.out.norm.scale[...] = jnp.zeros_like(self.out.norm.scale[...])

    def mix(self, x: jax.Array, given: Given) -> jax.Array:
        mine, others = jnp.split(x, [self.partial], axis=-1)
        q, k, v = jnp.split(
            call(self.qkv, self.norm(mine), given.deterministic), [self.key_dim, 2 * self.key_dim], axis=-1
        )

        def seen() -> jax.Array:
            return attention_weights(*(part.reshape(part.shape[0], -1, 1, self.key_dim) for part in (q, k)))

        record(self, "attention", seen)
        y = jnp.concatenate([single_head_attention(q, k, v), others], axis=-1)
        return call(self.out, jax.nn.relu(y), given.deterministic)
