"""Optimizers by name, learning-rate schedules, and which parameters decay.

Whatever the optimizer, an update is built in the same order, so that settings mean the same everywhere:

    gradient -> clip by global norm -> direction of the optimizer -> + weight_decay · parameter -> · (-learning rate)

The decay is decoupled from the gradient (Loshchilov and Hutter, 2019, arXiv:1711.05101) and follows the schedule of the
learning rate. LAMB scales by its trust ratio after the decay, as its paper has it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from attnlab.suggest import suggestion

Schedule = Literal["cosine", "linear", "constant"]
HYPERPARAMETERS = ("b1", "b2", "eps", "momentum", "nesterov")
NO_DECAY_NAMES = ("bias", "scale", "class_token", "cls_token")
NO_DECAY_PARTS = ("norm", "position", "pos_embed")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer with its schedule. A hyperparameter that is None has the optimizer's default (`OPTIMIZERS`).

    Attributes:
      name: one of `OPTIMIZERS`.
      learning_rate: at its peak.
      schedule: after the warm-up: "cosine" or "linear" down to `end_fraction` at the last step, or "constant".
      decay_steps: steps after which the schedule has come down, and stays there; all those of the training when None.
        A run that goes on keeps the number that it began with, however many steps it is now to have, unless this says
        otherwise: so that the learning rate never jumps unasked.
      warmup_steps: steps over which the learning rate rises linearly; the first step has 1 / warmup_steps of the peak.
      end_fraction: learning rate of the last step over the peak; for "cosine" and "linear".
      weight_decay: factor of the decoupled decay, see `decays` for the parameters that it leaves out.
      clip_norm: largest global norm of the gradient, None for no clipping.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      momentum: of "sgd" and "muon".
      nesterov: whether that momentum looks ahead.

    Raises:
      ValueError: for an unknown name, a hyperparameter that the optimizer does not have, or a value out of range.
    """

    name: str = "adamw"
    learning_rate: float = 1e-3
    schedule: Schedule = "cosine"
    decay_steps: int | None = None
    warmup_steps: int = 0
    end_fraction: float = 0.0
    weight_decay: float = 0.05
    clip_norm: float | None = 1.0
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    momentum: float | None = None
    nesterov: bool | None = None

    def __post_init__(self):
        if self.name not in OPTIMIZERS:
            raise ValueError(f"no optimizer is called {self.name!r}: {suggestion(self.name, OPTIMIZERS)}")
        if self.schedule not in get_args(Schedule):
            raise ValueError(
                f"no schedule is called {self.schedule!r}: {suggestion(self.schedule, get_args(Schedule))}"
            )
        defaults = OPTIMIZERS[self.name].defaults
        for given in HYPERPARAMETERS:
            if getattr(self, given) is not None and given not in defaults:
                has = ", ".join(defaults) or "none of its own"
                raise ValueError(f"{self.name} has no hyperparameter {given}; it has: {has}")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"decay_steps must be at least 1, not {self.decay_steps}")
        for field in ("learning_rate", "warmup_steps", "end_fraction", "weight_decay", "clip_norm"):
            value = getattr(self, field)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{field} must be a finite number of at least 0, not {value}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How `make_optimizer` makes one optimizer.

    Attributes:
      direction: from hyperparameters to the transformation that gives the direction of steepest ascent.
      defaults: the hyperparameters that it has.
      after_decay: what follows the weight decay.
    """

    direction: Callable[..., optax.GradientTransformation]
    defaults: dict[str, float | bool]
    after_decay: Callable[[], optax.GradientTransformation] = optax.identity


def _sgd(momentum: float, nesterov: bool) -> optax.GradientTransformation:
    return optax.trace(momentum, nesterov) if momentum else optax.identity()


def _adafactor() -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale_by_param_block_rms())


def _muon(momentum: float, nesterov: bool, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Muon for matrices, Adam for the rest; the root-mean-square of 0.2 lets both share a learning rate."""
    muon = optax.contrib.muon(
        1.0,
        beta=momentum,
        nesterov=nesterov,
        adam_b1=b1,
        adam_b2=b2,
        eps=eps,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=_muon_matrices,
    )
    return optax.chain(muon, optax.scale(-1.0))


_ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
OPTIMIZERS: dict[str, Recipe] = {
    "adamw": Recipe(optax.scale_by_adam, _ADAM),
    "nadamw": Recipe(lambda **kwargs: optax.scale_by_adam(nesterov=True, **kwargs), _ADAM),
    "lion": Recipe(optax.scale_by_lion, {"b1": 0.9, "b2": 0.99}),
    "lamb": Recipe(optax.scale_by_adam, _ADAM | {"eps": 1e-6}, optax.scale_by_trust_ratio),
    "sgd": Recipe(_sgd, {"momentum": 0.9, "nesterov": False}),
    "adafactor": Recipe(_adafactor, {}),
    "muon": Recipe(_muon, {"momentum": 0.95, "nesterov": True} | _ADAM),
}


def make_schedule(config: OptimizerConfig, total_steps: int) -> Callable[[Any], jax.Array]:
    """The learning rate of each step, from 0 to `total_steps` - 1.

    Raises:
      ValueError: if the warm-up is longer than the training, or than `decay_steps`.
    """
    total_steps = total_steps if config.decay_steps is None else config.decay_steps
    if config.warmup_steps > total_steps:
        raise ValueError(f"warmup_steps={config.warmup_steps} is more than the {total_steps} steps of the schedule")

    def learning_rate(step: Any) -> jax.Array:
        rise = (step + 1) / max(config.warmup_steps, 1)
        way = jnp.clip((step - config.warmup_steps) / max(total_steps - 1 - config.warmup_steps, 1), 0, 1)
        fall = {"cosine": (1 + jnp.cos(jnp.pi * way)) / 2, "linear": 1 - way, "constant": 1.0}[config.schedule]
        end = 1.0 if config.schedule == "constant" else config.end_fraction
        return config.learning_rate * jnp.minimum(rise, 1.0) * (end + (1 - end) * fall)

    return learning_rate


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """The transformation of gradients described in the module docstring."""
    recipe = OPTIMIZERS[config.name]
    given = {name: getattr(config, name) for name in recipe.defaults if getattr(config, name) is not None}
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        recipe.direction(**(recipe.defaults | given)),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        recipe.after_decay(),
        optax.scale_by_learning_rate(make_schedule(config, total_steps)),
    )


def decays(path: tuple[str, ...], ndim: int, metadata: dict[str, Any]) -> bool:
    """Whether weight decay applies to a parameter.

    It does if the parameter has two axes or more, is not itself called bias (or …_bias), scale, class_token or
    cls_token, and neither it nor a module around it has norm, position or pos_embed in its name: matrices and kernels
    decay; biases, norms, position tables and class tokens do not. A parameter made with the metadata
    `weight_decay=True` or `False` (`nnx.Param(value, weight_decay=False)`) decides for itself.

    Args:
      path: names of the attributes from the model to the parameter.
      ndim: its number of axes.
      metadata: of its variable.
    """
    if "weight_decay" in metadata:
        return bool(metadata["weight_decay"])
    named = path[-1] in NO_DECAY_NAMES or path[-1].endswith("_bias")
    named = named or any(part in name for name in path for part in NO_DECAY_PARTS)
    return ndim >= 2 and not named


def decay_mask(params: Any) -> Any:
    """`decays` for every parameter of an `nnx.State`, of the same structure."""
    return _map_variables(lambda path, leaf, metadata: decays(path, leaf.ndim, metadata), params)


def _muon_matrices(params: Any) -> Any:
    """The matrices inside the model: two axes, decaying, no axis of which is the vocabulary."""

    def choose(path: tuple[str, ...], leaf: Any, metadata: dict[str, Any]) -> Any:
        inner = leaf.ndim == 2 and "vocab" not in metadata.get("logical_axes", ())
        return optax.contrib.MuonDimensionNumbers() if inner and decays(path, leaf.ndim, metadata) else None

    return _map_variables(choose, params)


def _map_variables(function: Callable[[tuple[str, ...], Any, dict[str, Any]], Any], params: Any) -> Any:
    def of(path: tuple[Any, ...], node: Any) -> Any:
        metadata = node.get_metadata() if isinstance(node, nnx.Variable) else {}
        names = tuple(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)
        return jax.tree.map(lambda leaf: function(names, leaf, metadata), node)

    return jax.tree_util.tree_map_with_path(of, params, is_leaf=lambda node: isinstance(node, nnx.Variable))
