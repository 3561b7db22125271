"""Multi-head latent attention, MLA (DeepSeek-V2, 2024, arXiv:2405.04434; upcycled: X-EcoMLA, 2025, arXiv:2503.11132).

Keys and values of all heads are made of one latent of r channels, and one rotated key of Dr channels serves all heads:

    q_h = [q_h' (Dn) | R q_h'' (Dr)] = norm(x W_qa) W_qb         or x W_q, without the rank
    [c (r) | k''] = x W_kva,  c ← norm(c),  k'' ← R k''          R: rotary positions
    k_h = [c W_k,h (Dn) | k''],  v_h = c W_v,h (E)
    y = concat_h(softmax(q_h k_hᵀ / √(Dn + Dr)) v_h) W_o

Decoding keeps c and k'' alone, r + Dr numbers a token, and never makes keys or values of the tokens before: with
W_k,h drawn into the query and W_v,h behind the sum, all heads attend to the latents,

    s_ij = (q_h' W_k,hᵀ)·c_j + q_h''·k_j'',     y_h = (Σ_j a_ij c_j) W_v,h

at O(N·M·H·(r + Dr)). X-EcoMLA leaves the norms out, and makes the weights of a trained grouped-query attention by a
singular value decomposition (`attnlab.interop.mla_upcycling`). The authors' upcycled layer turns neighbouring channels
although the attention before it turned halves (`interleaved=False` keeps to it), and caches expanded keys.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import Given, Layout, View
from attnlab.nn.dense_mixer import DenseMixer, Heads, HeadSizes
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.linear import Linear
from attnlab.nn.norms import RMSNorm
from attnlab.nn.rotary import Rotary
from attnlab.nn.softmax_core import SoftmaxCore
from attnlab.points import Edits
from attnlab.registry import Cost, Paper, Source, register


class LatentCore(SoftmaxCore):
    """Softmax over keys and values that are made of latents `(B, M, 1, r + Dr)`; queries are `(B, N, H, Dn + Dr)`.

    Args:
      num_heads: heads H.
      rank: channels r of the latent.
      nope_dim: Dn, channels of a head without positions.
      rope_dim: Dr, rotated channels.
      value_dim: E.
      rotary: rotary positions of the Dr channels.
      scale: of the scores; (Dn + Dr)^-1/2 when None.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.
      **options: those of `SoftmaxCore`.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        rank: int,
        nope_dim: int,
        rope_dim: int,
        value_dim: int,
        rotary: Rotary | None = None,
        scale: float | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **options: Any,
    ):
        scale = (nope_dim + rope_dim) ** -0.5 if scale is None else scale
        super().__init__(num_heads, rotary=rotary, scale=scale, rngs=rngs, **options)
        self.rank, self.rope_dim = rank, rope_dim
        common: dict[str, Any] = {"use_bias": False, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.key = ToHeads(rank, num_heads, nope_dim, **common)
        self.value = ToHeads(rank, num_heads, value_dim, **common)

    def check(self, sizes: HeadSizes, layout: Layout) -> None:
        if self.rotary is not None:
            self.rotary.check(self.rope_dim, layout.axes)

    def __call__(
        self,
        heads: Heads,
        view: View,
        cache: Any = None,
        *,
        edits: Edits | None = None,
        deterministic: bool = True,
        owner: nnx.Module | None = None,
    ) -> tuple[jax.Array, Any]:
        q, latents, _, view, new = self.placed(heads, view, cache)
        about: dict[str, Any] = {"edits": edits, "deterministic": deterministic, "owner": owner}
        if cache is None:
            k, v = self.expand(latents)
            return self.attend(q, k, v, view, **about), None
        latents = latents.astype(q.dtype)
        into, out_of = self.key.kernel[...].astype(q.dtype), self.value.kernel[...].astype(q.dtype)
        own, turned = jnp.split(q, [q.shape[-1] - self.rope_dim], axis=-1)
        q = jnp.concatenate([jnp.einsum("bnhd,rhd->bnhr", own, into), turned], axis=-1)
        mean = self.attend(q, latents, latents[..., : self.rank], view, **about)
        return jnp.einsum("bnhr,rhe->bnhe", mean, out_of), new

    def attention(self, heads: Heads, view: View) -> jax.Array:
        q, latents, _, view, _ = self.placed(heads, view, None)
        return self.weights(q, self.expand(latents)[0], view)

    def expand(self, latents: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Keys `(B, M, H, Dn + Dr)` and values `(B, M, H, E)` of latents `(B, M, 1, r + Dr)`."""
        content, shared = jnp.split(jnp.asarray(latents)[:, :, 0], [self.rank], axis=-1)
        own = self.key(content)
        shared = jnp.broadcast_to(shared[:, :, None], (*own.shape[:-1], self.rope_dim))
        return jnp.concatenate([own, shared], axis=-1), self.value(content)

    def _rotate(self, x: jax.Array, at: ArrayLike) -> jax.Array:
        if self.rotary is None:
            return x
        own, turning = jnp.split(x, [x.shape[-1] - self.rope_dim], axis=-1)
        return jnp.concatenate([own, self.rotary(turning, at)], axis=-1)


@register(
    "mla",
    paper=Paper(
        "X-EcoMLA: Upcycling Pre-Trained Attention into MLA for Efficient and Extreme KV Compression",
        "Li et al.",
        2025,
        arxiv="2503.11132",
        number=58,
    ),
    source=Source.AUTHORS_CODE,
    repository="AMD-AIG-AIMA/AMD-Hybrid-Models",
    cost=Cost(time="O(N·M·H·(D+E))", memory="O(N·M·H), with block_size O(N·H·(D+E))", state="M·(r + Dr)"),
    summary="keys and values of all heads from one cached latent, and one rotated key for all",
    small={"rank": 6, "rope_dim": 2, "nope_dim": 3},
)
class MultiHeadLatentAttention(DenseMixer):
    """Tokens of any layout to the same shape. See the module docstring for the equations.

    Args:
      features: channels C.
      num_heads: heads H.
      rank: channels r of the latent of keys and values; 2 C / H when None.
      query_rank: channels of the latent of queries; None for one map.
      rope_dim: rotated channels Dr, half of C / H (made even) when None.
      nope_dim: other channels Dn of queries and keys; C / H - Dr when None.
      value_dim: E; C / H when None.
      latent_norm: whether latents pass an RMSNorm over their channels, as DeepSeek has it and X-EcoMLA has not.
      norm_eps: ε of the RMSNorm.
      causal: whether query i sees keys j ≤ i only.
      layout: of the tokens.
      context_features: channels of the context, for a module that needs one.
      rotary: rotary positions along the axes of the layout, or theta for `Rotary(theta, interleaved=interleaved)`;
        none when None.
      interleaved: whether a `rotary` given as theta turns neighbouring channels, as DeepSeek has it, not halves.
      scale: of the scores; (Dn + Dr)^-1/2 when None.
      use_bias: whether the maps to latents and the last map have a bias.
      attention_dropout: rate on the weights.
      block_size: keys per block, for memory linear in M; all at once when None.
      dtype: of the computation and the result; that of the tokens when None.
      param_dtype: of the parameters.
      rngs: streams `params`, and `dropout` if there is any.

    Raises:
      ValueError: for sizes that do not fit, or options that exclude each other.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        rank: int | None = None,
        query_rank: int | None = None,
        rope_dim: int | None = None,
        nope_dim: int | None = None,
        value_dim: int | None = None,
        latent_norm: bool = True,
        norm_eps: float = 1e-6,
        causal: bool = False,
        layout: Layout = Layout.SEQUENCE,
        context_features: int | None = None,
        rotary: Rotary | float | None = None,
        interleaved: bool = True,
        scale: float | None = None,
        use_bias: bool = False,
        attention_dropout: float = 0.0,
        block_size: int | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        _, head_dim, value_dim = HeadSizes.of(features, num_heads, None, None, value_dim)
        rank = 2 * head_dim if rank is None else rank
        rope_dim = max(head_dim // 4 * 2, 2) if rope_dim is None else rope_dim
        nope_dim = head_dim - rope_dim if nope_dim is None else nope_dim
        if min(rank, rope_dim, nope_dim, 1 if query_rank is None else query_rank) < 1:
            raise ValueError(
                f"ranks and sizes must be at least 1, got rank {rank}, query_rank {query_rank}, rope_dim {rope_dim}, "
                f"nope_dim {nope_dim}"
            )
        self.sizes = HeadSizes(1, rank + rope_dim, 0)
        self.features, self.num_heads, self.causal, self.layout = features, num_heads, causal, Layout(layout)
        self.context_features, self.dtype = context_features, dtype
        common: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        size, down = nope_dim + rope_dim, {"use_bias": use_bias, "axes": ("embed", None), **common}
        self.query_latent, self.query_norm = nnx.data(None), nnx.data(None)
        if query_rank is not None:
            self.query_latent = Linear(features, query_rank, **down)
            self.query_norm = _norm(query_rank, norm_eps, param_dtype, rngs) if latent_norm else nnx.data(None)
        self.query = ToHeads(features if query_rank is None else query_rank, num_heads, size, use_bias=False, **common)
        source = features if context_features is None else context_features
        self.latent = Linear(source, rank + rope_dim, **down)
        self.latent_norm = _norm(rank, norm_eps, param_dtype, rngs) if latent_norm else nnx.data(None)
        self.out = FromHeads(num_heads, value_dim, features, use_bias=use_bias, **common)
        rotary = Rotary.of(rotary, interleaved=interleaved)
        core = {"rotary": rotary, "scale": scale, "dropout": attention_dropout, "block_size": block_size}
        sizes = {"rank": rank, "nope_dim": nope_dim, "rope_dim": rope_dim, "value_dim": value_dim}
        self.set_core(LatentCore(num_heads, **sizes, **core, **common))

    def project(self, x: jax.Array, source: jax.Array, given: Given) -> Heads:
        q = x if self.query_latent is None else self.query_latent(x)
        q = self.query(q if self.query_norm is None else self.query_norm(q))
        latent = self.latent(source)
        if self.latent_norm is not None:
            content, shared = jnp.split(latent, [self.core.rank], axis=-1)
            latent = jnp.concatenate([self.latent_norm(content), shared], axis=-1)
        latent = latent[:, :, None]
        return Heads(q, latent, latent[..., :0])

    def merge(self, y: jax.Array, x: jax.Array, *, deterministic: bool = True) -> jax.Array:
        return self.out(y)


def _norm(channels: int, eps: float, param_dtype: Any, rngs: nnx.Rngs) -> RMSNorm:
    return RMSNorm(channels, eps=eps, param_dtype=param_dtype, rngs=rngs)
