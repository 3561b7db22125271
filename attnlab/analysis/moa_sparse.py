"""How a plan of elastic rules is found (MoA, Fu et al., 2024, arXiv:2406.14909): `attnlab.interventions.moa_sparse`.

Calibration gives the influence of each attention weight on the loss L: what removing it would add, to first order, when
its row is scaled to sum to 1 again,

    G = ∂L/∂A,   E_ij = -A_ij (G_ij - Σ_k A_ik G_ik) / (1 - A_ij),   E_0j = -A_0j G_0j          row 0 has one key

A rule's loss is the influence that it drops, its density the largest share of blocks that a row keeps. Of the rules
that fit all lengths, one for each head is chosen such that losses at the profiled lengths are least, the mean density
is within its bound at every length, and a layer has at most two rules. Losses at several lengths are several
objectives: the plans that no other one is better than in all of them are the candidates, and the one with the least
loss at a length that was not profiled is taken.

    importance = mean over examples of |attention_influence(q, k, v, grad_out, block_size=64)|          a layer's heads
    alpha, beta = search_space(*rule_grids(8192, 2048), max_profile_length=8192, max_token_length=16384,
                               min_token_length=2048)
    loss, density = rule_loss(importance, alpha, beta, 4096, importance_block=64)
    plans = pareto_plans(losses, densities)

The authors solve by Gurobi and optimise a latency that is measured; here it is the density, by SciPy's solver, exactly.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from attnlab.interventions.moa_sparse import PAPER, Plan, elastic_layout
from attnlab.nn.masking import masked_softmax
from attnlab.nn.softmax import attention_scores
from attnlab.registry import Cost, Example, Kind, Source, register

REPOSITORY = "thu-nics/MoA"


def _influence_example() -> Example:
    keys = jax.random.split(jax.random.key(0), 4)
    return Example(
        attention_influence,
        tuple(jax.random.normal(key, (2, 8, 2, 4)) for key in keys),
        {"block_size": 2},
        batched=(0, 1, 2, 3),
        differentiable=(0, 1, 2, 3),
    )


@register(
    "moa_sparse.influence",
    kind=Kind.ANALYSIS,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=Cost("O(N²·H·(D+E))", "O(N²·H)"),
    summary="what removing an attention weight adds to the loss, to first order",
    small=_influence_example,
)
def attention_influence(
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    grad_out: ArrayLike,
    *,
    block_size: int = 1,
    take_abs: bool = False,
    scale: float | None = None,
) -> jax.Array:
    """Influence of the weights of causal attention.

    Args:
      q: queries, (B, N, H, D), rotated.
      k: keys, (B, N, G, D), rotated, G a divisor of H.
      v: values, (B, N, G, E).
      grad_out: gradient of the loss for the heads' results, (B, N, H, E).
      block_size: side of the blocks over which influence is summed, a divisor of N.
      take_abs: whether absolute values are summed.
      scale: of the scores; D^-1/2 when None.

    Returns:
      (B, H, N, N), or (B, H, N / block_size, N / block_size), float32 (or wider).

    Raises:
      ValueError: for shapes that do not fit, or blocks that do not divide N.
    """
    q, k, v, grad_out = (jnp.asarray(x) for x in (q, k, v, grad_out))
    batch, tokens, heads = q.shape[:3]
    if grad_out.shape != (batch, tokens, heads, v.shape[-1]) or k.shape[:3] != v.shape[:3] or len(k) != batch:
        raise ValueError(f"shapes do not fit: q {q.shape}, k {k.shape}, v {v.shape}, grad_out {grad_out.shape}")
    if block_size < 1 or tokens % block_size:
        raise ValueError(f"block_size must divide the {tokens} tokens, got {block_size}")
    causal = jnp.tri(tokens, dtype=bool)
    weights = masked_softmax(attention_scores(q, k, scale=scale), causal)
    wide = jnp.repeat(v, heads // v.shape[2], axis=2).astype(weights.dtype)
    highest = jax.lax.Precision.HIGHEST
    slope = jnp.einsum("bnhe,bmhe->bhnm", grad_out.astype(weights.dtype), wide, precision=highest)
    moved = weights * slope
    left = 1 - weights + jnp.finfo(weights.dtype).eps
    effect = weights * (slope - moved.sum(-1, keepdims=True)) / left
    effect = -effect.at[:, :, 0].set(moved[:, :, 0])
    effect = jnp.where(causal, jnp.abs(effect) if take_abs else effect, 0)
    if block_size > 1:
        count = tokens // block_size
        effect = effect.reshape(batch, heads, count, block_size, count, block_size).sum((3, 5))
    return effect


class RuleLoss(NamedTuple):
    """What rules cost.

    Attributes:
      loss: importance that a rule drops, `(H, R)` in float32.
      density: largest share of blocks that a row keeps, `(R,)` float32.
    """

    loss: jax.Array
    density: jax.Array


def _rule_example() -> Example:
    importance = jnp.abs(jax.random.normal(jax.random.key(0), (2, 8, 8)))
    rules = jnp.asarray([0.0, 2.0, 4.0]), jnp.asarray([0.5, 0.25, 0.5])
    return Example(rule_loss, (importance, *rules, 8), {"block_size": 2}, batched=())


@register(
    "moa_sparse.rule_loss",
    kind=Kind.ANALYSIS,
    paper=PAPER,
    source=Source.AUTHORS_CODE,
    repository=REPOSITORY,
    cost=Cost("O(R·H·N²)", "O(H·N² + R·(N/b)²)"),
    summary="importance that each elastic rule drops from each head's attention, and how dense it is",
    small=_rule_example,
)
def rule_loss(
    importance: ArrayLike,
    alpha: ArrayLike,
    beta: ArrayLike,
    num_tokens: int,
    *,
    block_size: int = 64,
    importance_block: int = 1,
    normalize: bool = False,
    loss_ratio: float = 1.0,
) -> RuleLoss:
    """Losses and densities of R rules at one length.

    Args:
      importance: of each head's weights, absolute influence as a rule, (H, M, M) for M at least N / importance_block.
      alpha: α of each rule, (R,).
      beta: β, (R,).
      num_tokens: N.
      block_size: b, tokens of a block of rules, a divisor of N.
      importance_block: 1 where the importance is of tokens, b where it is summed over blocks.
      normalize: whether each head's losses are divided by all of its importance, then all by one factor that keeps
        the sum over heads.
      loss_ratio: factor of the losses.

    Raises:
      ValueError: for blocks or shapes that do not fit.
    """
    importance = jnp.asarray(importance)
    importance = importance.astype(jnp.result_type(importance, jnp.float32))
    if importance_block not in (1, block_size) or num_tokens % block_size:
        raise ValueError(
            f"importance_block must be 1 or block_size, a divisor of {num_tokens} tokens, got {importance_block} and "
            f"{block_size}"
        )
    size = num_tokens // importance_block
    if importance.ndim != 3 or importance.shape[1] != importance.shape[2] or importance.shape[1] < size:
        raise ValueError(f"importance must be (H, M, M) with M at least {size}, got {importance.shape}")
    importance = jnp.where(jnp.tri(size, dtype=bool), importance[:, :size, :size], 0)
    count, side = num_tokens // block_size, block_size // importance_block
    blocks = importance.reshape(-1, count, side, count, side).sum((2, 4))
    layout = elastic_layout(alpha, beta, num_tokens, block_size=block_size)
    dropped = (~layout & jnp.tri(count, dtype=bool)).astype(blocks.dtype)
    loss = jnp.einsum("hij,rij->hr", blocks, dropped, precision=jax.lax.Precision.HIGHEST)
    if normalize:
        total = blocks.sum((1, 2))[:, None]
        shares = loss / jnp.where(total == 0, 1, total)
        all_shares = shares.sum(0)
        loss = shares * jnp.where(all_shares == 0, 0, loss.sum(0) / jnp.where(all_shares == 0, 1, all_shares))
    density = layout.sum(-1).max(-1).astype(jnp.float32) / count
    return RuleLoss(loss * loss_ratio, density)


def rule_grids(
    max_profile_length: int, min_token_length: int, *, interval: int = 1024, num_betas: int = 9
) -> tuple[np.ndarray, np.ndarray]:
    """Values of α, from -min_token_length to max_profile_length about every `interval`, and of β, from 0 to 1."""
    steps = (max_profile_length + min_token_length) // interval + 1
    return np.linspace(-min_token_length, max_profile_length, steps), np.linspace(0, 1, num_betas)


def search_space(
    alphas: ArrayLike, betas: ArrayLike, *, max_profile_length: int, max_token_length: int, min_token_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """All rules (α, β) of two grids whose span is within all lengths, by ascending span at the largest.

    Args:
      alphas: values of α.
      betas: values of β.
      max_profile_length: largest length that was profiled, which no span exceeds.
      max_token_length: largest length, which no span exceeds either.
      min_token_length: least length, at which a span is above 0.

    Returns:
      α and β of each rule, (R,) each.
    """
    grid = np.meshgrid(np.asarray(alphas), np.asarray(betas), indexing="ij")
    alpha, beta = (part.reshape(-1) for part in grid)
    fits = (alpha + beta * max_profile_length <= max_profile_length) & (alpha + beta * min_token_length > 0)
    fits &= alpha + beta * max_token_length <= max_token_length
    alpha, beta = np.extract(fits, alpha), np.extract(fits, beta)
    order = np.argsort(alpha + beta * max_token_length, kind="stable")
    return alpha[order], beta[order]


class Candidate(NamedTuple):
    """A choice of rules that no other one is better than in all objectives.

    Attributes:
      rules: index of each head's rule, (L, H) int.
      losses: at each profiled length, (P,).
    """

    rules: np.ndarray
    losses: np.ndarray


def pareto_plans(
    losses: ArrayLike,
    densities: ArrayLike,
    *,
    bound: float = 0.5,
    least: float = 0.9,
    max_rules: int = 2,
    points: int = 5,
    time_limit: float | None = None,
) -> list[Candidate]:
    """Choices of a rule for each head, by binary programmes: each objective alone, and within steps of the others.

    Args:
      losses: of P profiled lengths, L layers, H heads and R rules, (P, L, H, R).
      densities: of the rules at Q lengths, (Q, R).
      bound: largest mean density at each length.
      least: smallest mean density, as a share of the bound.
      max_rules: most different rules of a layer.
      points: bounds of the steps of each objective, 2 at least.
      time_limit: seconds for each programme; none when None.

    Returns:
      The choices that no other one found is better than in all objectives, by the first one's loss.

    Raises:
      ValueError: for shapes that do not fit, or if there is no choice within the bounds.
    """
    losses, densities = np.asarray(losses, np.float64), np.asarray(densities, np.float64)
    if losses.ndim != 4 or densities.ndim != 2 or losses.shape[-1] != densities.shape[-1] or points < 2:
        raise ValueError(
            f"losses must be (P, L, H, R), densities (Q, R) and points at least 2, got {losses.shape}, "
            f"{densities.shape} and {points}"
        )
    programme = _Programme(losses, densities, bound, least, max_rules, time_limit)
    found = [programme.solve(objective, {}) for objective in range(len(losses))]
    if any(one is None for one in found):
        raise ValueError(f"no choice of rules has a mean density in {least * bound}..{bound} at every length")
    ranges = np.array([one.losses for one in found if one is not None])
    steps = np.linspace(ranges.min(0), ranges.max(0), points)
    for objective in range(len(losses)):
        others = [other for other in range(len(losses)) if other != objective]
        for places in itertools.product(range(points - 1), repeat=len(others)) if others else ():
            within = {o: (steps[place, o], steps[place + 1, o]) for o, place in zip(others, places, strict=True)}
            found.append(programme.solve(objective, within))
    candidates = [one for one in found if one is not None]
    values = np.array([one.losses for one in candidates])
    better = np.asarray((values[:, None] <= values).all(-1) & (values[:, None] < values).any(-1))
    _, first = np.unique(values.round(12), axis=0, return_index=True)
    return [candidates[i] for i in first if not better[:, i].any()]


class _Programme:
    """Variables: whether head h of layer l has rule r (L·H·R), then whether layer l has it at all (L·R)."""

    def __init__(
        self,
        losses: np.ndarray,
        densities: np.ndarray,
        bound: float,
        least: float,
        max_rules: int,
        time_limit: float | None,
    ):
        from scipy.optimize import LinearConstraint  # type: ignore[import-untyped]
        from scipy.sparse import bmat, csr_array, eye_array, kron  # type: ignore[import-untyped]

        self.losses, self.shape = losses, losses.shape[1:]
        layers, heads, rules = self.shape
        one_each = kron(eye_array(layers * heads), np.ones((1, rules)))
        mean = np.tile(densities, (1, layers * heads)) / (layers * heads)
        # A head has a rule only if its layer has.
        of_layer = kron(kron(eye_array(layers), np.ones((heads, 1))), eye_array(rules))
        used = kron(eye_array(layers), np.ones((1, rules)))
        self.constraints = [
            LinearConstraint(bmat([[one_each, csr_array((layers * heads, layers * rules))]], "csr"), 1, 1),
            LinearConstraint(np.pad(mean, ((0, 0), (0, layers * rules))), least * bound, bound),
            LinearConstraint(bmat([[eye_array(of_layer.shape[0]), -of_layer]], "csr"), -np.inf, 0),
            LinearConstraint(bmat([[csr_array((layers, losses[0].size)), used]], "csr"), -np.inf, max_rules),
        ]
        self.options = {} if time_limit is None else {"time_limit": time_limit}
        self.extra = layers * rules

    def solve(self, objective: int, within: dict[int, tuple[float, float]]) -> Candidate | None:
        """The least of one objective, others within bounds; None if there is no choice."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        rows = np.pad(self.losses.reshape(len(self.losses), -1), ((0, 0), (0, self.extra)))
        more = [LinearConstraint(rows[other][None], *bounds) for other, bounds in within.items()]
        result = milp(
            rows[objective],
            integrality=np.ones(rows.shape[1]),
            bounds=Bounds(0, 1),
            constraints=[*self.constraints, *more],
            options=self.options,
        )
        if result.x is None:
            return None
        chosen = np.argmax(result.x[: -self.extra].reshape(self.shape), axis=-1)
        picked = np.take_along_axis(self.losses, chosen[None, ..., None], axis=-1)
        return Candidate(chosen, picked.sum((1, 2, 3)))


def choose_plan(candidates: Sequence[Candidate], alpha: ArrayLike, beta: ArrayLike, unseen_losses: ArrayLike) -> Plan:
    """The candidate with the least loss at a length that was not profiled, as a plan.

    Args:
      candidates: of `pareto_plans`.
      alpha: α of the rules, (R,).
      beta: β of the rules, (R,).
      unseen_losses: (L, H, R) at that length.
    """
    unseen, alpha, beta = np.asarray(unseen_losses), np.asarray(alpha), np.asarray(beta)
    totals = [np.take_along_axis(unseen, one.rules[..., None], axis=-1).sum() for one in candidates]
    rules = candidates[int(np.argmin(totals))].rules
    return Plan(alpha[rules].tolist(), beta[rules].tolist())
