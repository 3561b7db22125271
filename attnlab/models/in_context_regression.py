"""In-context linear regression by one layer of attention (He et al., ICML 2025, arXiv:2503.12734).

A query z_q = (x_q, 0) attends to L examples z_l = (x_l, y_l) of n = d + 1 numbers, with H heads of the full width n,
and is not among them; no residual, no positions, no feed-forward:

    ŷ = Σ_h W_o,h Σ_l softmax_l(W_q,h z_q · W_k,h z_l / √n) W_v,h z_l

Trained by squared error, W_q,hᵀ W_k,h / √n becomes ω_h I on x, W_o,h W_v,h reads y with a factor μ_h, and the μ_h sum
to 0: two opposite heads take a step of debiased gradient descent. `attnlab.analysis.icl_linear_regression` has what to
read off and the theory, `attnlab.tasks.linear_regression` the data.

Reference: XintianPan/ICL_linear, `MultiHeadAttention`. Its causal class of several layers takes two softmaxes of the
same scores, a defect, and is left out.
"""

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from attnlab.contract import record
from attnlab.models.inputs import Vectors
from attnlab.nn.heads import FromHeads, ToHeads
from attnlab.nn.softmax import attention_weights, softmax_attention
from attnlab.points import Editable, visit
from attnlab.registry import Cost, Example, Kind, Paper, Source, register

PAPER = Paper(
    "In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability of Multi-Head "
    "Softmax Attention",
    "He et al.",
    2025,
    "2503.12734",
    number=54,
)
INITS = {"random": None, "small_id": 1e-6, "small_id_qk": 1e-4, "oppo_small_id": 1e-6}
"""Initial weights, and the factor of the identity that they are if they are not random."""


def _example() -> Example:
    keys = jax.random.split(jax.random.key(0))
    given = jax.random.normal(keys[0], (2, 1, 4)), jax.random.normal(keys[1], (2, 7, 4))
    module = InContextAttention(4, num_heads=2, out_features=1, rngs=nnx.Rngs(0))
    return Example(module, given, {"mask": jnp.arange(7) < jnp.asarray([[7], [5]])}, (0, 1, "mask"), (0, 1))


@register(
    "icl_linear_regression",
    kind=Kind.MODULE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="XintianPan/ICL_linear",
    cost=Cost("O(Q·L·H·n)", "O(Q·L·H)"),
    summary="queries attend to examples with heads of the full width; their sum is the prediction",
    small=_example,
)
class InContextAttention(nnx.Module):
    """Queries `(B, Q, n)` and examples `(B, L, n)` to predictions `(B, Q, out_features)`.

    Args:
      features: n, numbers of an example.
      num_heads: H.
      out_features: numbers of a prediction; n when None.
      init: `"random"` (uniform in ±1/√fan-in); `"small_id"`, where the maps to queries, keys and values are 1e-6 times
        the identity in each head, and the last one too if `out_features` is None; `"small_id_qk"`, where those to
        queries and keys are 1e-4 times it; `"oppo_small_id"`, where those to keys are 1e-6 times it and those to
        queries are so with the opposite sign in the second half of the heads.
      use_bias: whether the maps have biases.
      dtype: of the computation and the result; that of the queries when None.
      param_dtype: of the parameters.
      rngs: stream `params`.

    Raises:
      ValueError: for an unknown `init`, or an odd number of heads for opposite ones.
    """

    def __init__(
        self,
        features: int,
        *,
        num_heads: int,
        out_features: int | None = None,
        init: Literal["random", "small_id", "small_id_qk", "oppo_small_id"] = "random",
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if init not in INITS:
            raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
        if init == "oppo_small_id" and num_heads % 2:
            raise ValueError(f"init='oppo_small_id' needs an even num_heads, got {num_heads}")
        self.features, self.num_heads, self.dtype = features, num_heads, dtype
        out = features if out_features is None else out_features
        inner, last = features**-0.5, (num_heads * features) ** -0.5
        into = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        into |= {"kernel_init": _uniform(inner), "bias_init": _uniform(inner)}
        self.query, self.key, self.value = (ToHeads(features, num_heads, features, **into) for _ in range(3))
        of = into | {"kernel_init": _uniform(last), "bias_init": _uniform(last)}
        self.out = FromHeads(num_heads, features, out, **of)
        scale = INITS[init]
        if scale is not None:
            small = scale * jnp.broadcast_to(jnp.eye(features)[:, None], (features, num_heads, features))
            signs = jnp.where(jnp.arange(num_heads) < num_heads // 2, 1, -1) if init == "oppo_small_id" else 1
            self.query.kernel[...] = (small * jnp.reshape(signs, (-1, 1))).astype(param_dtype)
            self.key.kernel[...] = small.astype(param_dtype)
        if init == "small_id":
            self.value.kernel[...] = small.astype(param_dtype)
            if out_features is None:
                self.out.kernel[...] = jnp.moveaxis(small, 0, 1).astype(param_dtype)

    def __call__(self, z_q: ArrayLike, z: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Predicts.

        Args:
          z_q: queries, whose last number is 0 in place of what is asked for.
          z: examples.
          mask: `(B, L)` boolean, which examples exist.

        Raises:
          ValueError: for shapes that do not fit.
        """
        z_q = jnp.asarray(z_q, self.dtype)
        z = jnp.asarray(z, z_q.dtype)
        for name, array in (("z_q", z_q), ("z", z)):
            if array.ndim != 3 or array.shape[-1] != self.features:
                raise ValueError(f"{name} must be (B, N, {self.features}), got shape {array.shape}")
        if z_q.shape[0] != z.shape[0]:
            raise ValueError(f"z_q and z must have the same batch, got {z_q.shape} and {z.shape}")
        q, k, v = self.query(z_q), self.key(z), self.value(z)
        record(self, "attention", lambda: attention_weights(q, k, mask=mask))
        return self.out(softmax_attention(q, k, v, mask=mask))


def _uniform(bound: float) -> nnx.Initializer:
    def draw(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return draw


@register(
    "icl_linear_regression.regressor",
    kind=Kind.BACKBONE,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="XintianPan/ICL_linear",
    cost=Cost("O(L·H·n)", "O(L·H)"),
    summary="the one-layer model on sequences whose last vector is the query, to be trained on in-context regression",
    small={"token_features": 4, "responses": 1, "num_heads": 2},
)
class InContextRegressor(Editable):
    """Sequences `(B, L + 1, n)` of examples and a query to predictions `(B, responses)` in float32.

    Args:
      token_features: n, numbers of a vector.
      responses: numbers of a prediction.
      num_heads: H.
      init: initial weights, see `InContextAttention`.
      use_bias: whether the maps have biases.
      dtype: of the computation; that of the vectors when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    inputs: ClassVar[Vectors] = Vectors()
    model_points = frozenset({"logits"})

    def __init__(
        self,
        token_features: int,
        responses: int,
        *,
        num_heads: int = 2,
        init: Literal["random", "small_id", "small_id_qk", "oppo_small_id"] = "random",
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        sizes = {"num_heads": num_heads, "out_features": responses, "init": init, "use_bias": use_bias}
        common = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.attention = InContextAttention(token_features, **sizes, **common)

    def __call__(self, x: ArrayLike, *, deterministic: bool = True) -> jax.Array:
        """Predicts from vectors, of which the last is the query."""
        x = jnp.asarray(x)
        y = self.attention(x[:, -1:], x[:, :-1])[:, 0].astype(jnp.float32)
        return visit(self, self.edits().model, "logits", y)
