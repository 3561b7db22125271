"""What one layer of attention learns of in-context linear regression, read off and predicted (arXiv:2503.12734).

Of a trained `InContextAttention` with heads h, n = d + 1:

    KQ_h = W_q,hᵀ W_k,h / √n,   ω_h = mean of its first d diagonal entries
    OV_h = W_o,h W_v,h,         μ_h = its last entry

In theory, with s = σ² the variance of the noise and A(ω) = ω ωᵀ + (1 + s)/L · exp(d ω ωᵀ), element by element:

    loss      ℓ(ω, μ) = 1 + s - 2 μ·ω + μᵀ A μ;    the best μ*(ω) = A⁻¹ ω
    flow      of ℓ/2:   ∂μ = -ω + A μ,   ∂ω = -μ + (μ·ω) μ + d (1 + s)/L (exp(d ω ωᵀ) ∘ μ μᵀ) ω

and predictions from X (d, L), y (L,) and x_q (d,):

    heads     Σ_h μ_h y·softmax(ω_h Xᵀ x_q)
    GD        2 ω μ y·Xᵀ x_q / L                        debiased:  2 ω μ (y·Xᵀ x_q - (Σ y) (mean_l x_l · x_q)) / L
    ridge     x_q·(X Xᵀ + s d I)⁻¹ X y                   its risk for d/L = ξ in the limit: ridge_risk(ξ, s)

Reference: XintianPan/ICL_linear, `TFEst`, `gradients`, `gradient_flow`, `ridge_loss`. The authors' loss function is ℓ,
their gradients and the losses along a flow are of ℓ/2, and so are these.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnlab.models.in_context_regression import PAPER, InContextAttention
from attnlab.registry import Cost, Example, Kind, Source, register


class Heads(NamedTuple):
    """What heads compute, float32.

    Attributes:
      kq: `(H, n, n)`.
      ov: `(H, out, n)`.
      omega: `(H,)`.
      mu: `(H,)`, of the first output.
    """

    kq: jax.Array
    ov: jax.Array
    omega: jax.Array
    mu: jax.Array


def _example() -> Example:
    kernels = [jax.random.normal(key, (4, 2, 4)) for key in jax.random.split(jax.random.key(0), 3)]
    out = jax.random.normal(jax.random.key(1), (2, 4, 1))
    return Example(read_heads, (*kernels, out), batched=(), differentiable=(0, 1, 2, 3))


@register(
    "icl_linear_regression.heads",
    kind=Kind.ANALYSIS,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository="XintianPan/ICL_linear",
    cost=Cost("O(H·n³)", "O(H·n²)"),
    summary="what each head of in-context regression multiplies covariates and responses with",
    small=_example,
)
def read_heads(query: ArrayLike, key: ArrayLike, value: ArrayLike, out: ArrayLike, *, responses: int = 1) -> Heads:
    """Products of the maps of each head.

    Args:
      query: kernel `(n, H, n)`, channels that come in first.
      key: the same.
      value: the same.
      out: kernel `(H, n, out)`.
      responses: how many of the n numbers of an example are responses, at its end.

    Raises:
      ValueError: for kernels that do not fit.
    """
    query, key, value, out = (jnp.asarray(kernel, jnp.float32) for kernel in (query, key, value, out))
    if not query.shape == key.shape == value.shape or query.ndim != 3 or out.shape[:2] != query.shape[1:]:
        shapes = [kernel.shape for kernel in (query, key, value, out)]
        raise ValueError(f"kernels must be (n, H, n) thrice and (H, n, out), got {shapes}")
    width = query.shape[-1]
    if not 1 <= responses < query.shape[0]:
        raise ValueError(f"responses must lie in 1..{query.shape[0] - 1}, got {responses}")
    kq = jnp.einsum("ahm,bhm->hab", query, key, precision="highest") * width**-0.5
    ov = jnp.einsum("ahm,hmo->hoa", value, out, precision="highest")
    covariates = query.shape[0] - responses
    omega = jnp.diagonal(kq, axis1=1, axis2=2)[:, :covariates].mean(-1)
    return Heads(kq, ov, omega, ov[:, 0, covariates])


def heads_of(module: InContextAttention, *, responses: int = 1) -> Heads:
    """`read_heads` of a module."""
    kernels = (module.query.kernel, module.key.kernel, module.value.kernel, module.out.kernel)
    return read_heads(*(kernel[...] for kernel in kernels), responses=responses)


# Theory: vectors omega and mu (H,); d covariates, L examples, variance of the noise; NumPy in float64


def _matrix(omega: np.ndarray, d: int, length: int, variance: float) -> tuple[np.ndarray, np.ndarray]:
    """A(ω), and its second term, (H, H)."""
    outer = np.outer(omega, omega)
    noise = (1 + variance) / length * np.exp(d * outer)
    return outer + noise, noise


def approximate_loss(omega: ArrayLike, mu: ArrayLike, *, d: int, length: int, variance: float) -> np.ndarray:
    """ℓ(ω, μ)."""
    omega, mu = _vectors(omega, mu)
    return 1 + variance - 2 * mu @ omega + mu @ _matrix(omega, d, length, variance)[0] @ mu


def optimal_mu(omega: ArrayLike, *, d: int, length: int, variance: float) -> np.ndarray:
    """μ*(ω), `(H,)`."""
    (omega,) = _vectors(omega)
    return np.linalg.solve(_matrix(omega, d, length, variance)[0], omega)


def flow_gradients(
    omega: ArrayLike, mu: ArrayLike, *, d: int, length: int, variance: float
) -> tuple[np.ndarray, np.ndarray]:
    """The gradients of ℓ/2 by μ and by ω, each `(H,)`."""
    omega, mu = _vectors(omega, mu)
    matrix, noise = _matrix(omega, d, length, variance)
    by_mu = matrix @ mu - omega
    by_omega = -mu + (mu @ omega) * mu + d * (noise * np.outer(mu, mu)) @ omega
    return by_mu, by_omega


class Flow(NamedTuple):
    """A flow at the recorded steps: `mu` and `omega` `(T, H)`, `loss` `(T,)`, which is ℓ/2."""

    mu: np.ndarray
    omega: np.ndarray
    loss: np.ndarray


def gradient_flow(
    omega: ArrayLike,
    mu: ArrayLike,
    *,
    d: int,
    length: int,
    variance: float,
    rate: float,
    steps: int,
    every: int = 1,
) -> Flow:
    """Gradient descent of ℓ/2 from `omega` and `mu`, recorded at the steps 0, every, 2 every, ..., to `steps`.

    Raises:
      ValueError: unless `every` divides `steps`.
    """
    if every < 1 or steps % every:
        raise ValueError(f"every must divide steps, got {every} and {steps}")
    omega, mu = _vectors(omega, mu)
    setting = {"d": d, "length": length, "variance": variance}
    found = [(mu, omega, approximate_loss(omega, mu, **setting) / 2)]
    for step in range(1, steps + 1):
        by_mu, by_omega = flow_gradients(omega, mu, **setting)
        mu, omega = mu - rate * by_mu, omega - rate * by_omega
        if step % every == 0:
            found.append((mu, omega, approximate_loss(omega, mu, **setting) / 2))
    return Flow(*(np.stack(parts) for parts in zip(*found, strict=True)))


def ridge_risk(ratio: float, variance: float) -> float:
    """The risk of ridge regression where d and L grow with d/L = ξ: (b + √(b² + 4 σ²/ξ))/2, b = σ² - (1 - ξ)/ξ."""
    b = variance - (1 - ratio) / ratio
    return 0.5 * (b + np.sqrt(b * b + 4 * variance / ratio))


def _vectors(*arrays: ArrayLike) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(array, np.float64) for array in arrays)


# Predictions from examples


def predict_by_heads(x: ArrayLike, y: ArrayLike, x_q: ArrayLike, *, omega: ArrayLike, mu: ArrayLike) -> jax.Array:
    """Σ_h μ_h y·softmax(ω_h Xᵀ x_q): covariates `(d, L)`, responses `(L,)` and a query `(d,)` to a number."""
    scores = jnp.asarray(x_q) @ jnp.asarray(x)
    return jnp.asarray(mu) @ (jax.nn.softmax(jnp.outer(omega, scores)) @ jnp.asarray(y))


def predict_by_descent(
    x: ArrayLike, y: ArrayLike, x_q: ArrayLike, *, omega: ArrayLike, mu: ArrayLike, debiased: bool = False
) -> jax.Array:
    """A step of gradient descent, with factors ω and μ that are numbers; debiased by the mean of the covariates."""
    x, y, x_q = jnp.asarray(x), jnp.asarray(y), jnp.asarray(x_q)
    x = x - x.mean(1, keepdims=True) if debiased else x
    return 2 * jnp.asarray(omega) * mu * (y @ (x_q @ x)) / x.shape[1]


def predict_by_ridge(x: ArrayLike, y: ArrayLike, x_q: ArrayLike, *, variance: ArrayLike) -> jax.Array:
    """Ridge regression with the strength σ² d, the best prediction for coefficients of variance 1/d."""
    x, y, x_q = jnp.asarray(x), jnp.asarray(y), jnp.asarray(x_q)
    gram = x @ x.T + variance * x.shape[0] * jnp.eye(x.shape[0])
    return x_q @ jnp.linalg.solve(gram, x @ y)
