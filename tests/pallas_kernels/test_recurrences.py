"""What a user relies on of every op with a state: chaining, decoding, packing, causality, dtypes, extreme decays."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    delta_rule_attention,
    delta_rule_attention_step,
    init_state,
    linear_attention,
    linear_attention_step,
)
from pallas_kernels.delta_rule_attention import cases as delta_rule_cases
from pallas_kernels.delta_rule_attention import init_state as delta_rule_init_state
from pallas_kernels.linear_attention import cases as linear_cases
from tests.pallas_kernels.accuracy import assert_close
from tests.pallas_kernels.quick import quick


@dataclasses.dataclass(frozen=True)
class Op:
    """An op, its step, and its cases.

    Attributes:
      run: the op.
      step: the op for one token.
      init_state: the empty state.
      case: class of its cases.
      tokens: arguments with an axis of tokens that every call has.
    """

    run: Callable
    step: Callable
    init_state: Callable
    case: Callable
    tokens: tuple[str, ...]


LINEAR = Op(linear_attention, linear_attention_step, init_state, linear_cases.Case, ("q", "k", "v"))
DELTA_RULE = Op(
    delta_rule_attention,
    delta_rule_attention_step,
    delta_rule_init_state,
    delta_rule_cases.Case,
    ("q", "k", "v", "beta"),
)
DECAYS = [(LINEAR, decay) for decay in (None, "head", "token", "channel")]
DECAYS += [(DELTA_RULE, decay) for decay in (None, "head", "token")]
# With what else a case is made and an op and its step are called.
VARIANTS = [(op, decay, {}) for op, decay in DECAYS]
VARIANTS += [(op, decay, {"normalize": True}) for op, decay in DECAYS if op is LINEAR]


def name(values) -> str:
    """The op, and what else there is."""
    op, *others = values
    return "-".join([{LINEAR: "linear", DELTA_RULE: "delta_rule"}[op], *map(str, others)])


QUICK_DECAYS = ("linear-token", "linear-channel", "delta_rule-head")
QUICK = (
    "linear-head-{}",
    "linear-channel-{'normalize': True}",
    "delta_rule-token-{}",
)
by_decay = pytest.mark.parametrize(("op", "decay"), quick(DECAYS, QUICK_DECAYS, name))
by_variant = pytest.mark.parametrize(("op", "decay", "options"), quick(VARIANTS, QUICK, name))
by_op = pytest.mark.parametrize("op", [LINEAR, DELTA_RULE], ids=("linear", "delta_rule"))


def part(op, arguments, tokens):
    """The arguments of some of the tokens: everything that has a token axis, cut."""
    cut = {name: arguments[name][:, tokens] for name in op.tokens}
    decay = arguments.get("log_decay")
    return cut | ({} if decay is None else {"log_decay": decay if decay.ndim == 1 else decay[:, tokens]})


@by_variant
def test_two_halves_chained_by_the_state_are_the_whole(op, decay, options):
    arguments, _ = op.case("chain", length=150, heads=4, kv_heads=2, decay=decay, **options).arguments()
    want = op.run(**arguments, **options, return_state=True)
    first, state = op.run(**part(op, arguments, slice(0, 67)), **options, return_state=True)
    rest = part(op, arguments, slice(67, None))
    second, state = op.run(**rest, **options, initial_state=state, return_state=True)
    assert_close((jnp.concatenate([first, second], axis=1), state), want)


@by_variant
def test_steps_are_the_whole(op, decay, options):
    case = op.case("steps", length=9, heads=4, kv_heads=2, value_size=5, decay=decay, **options)
    arguments, _ = case.arguments()
    want = op.run(**arguments, **options, scale=0.3, return_state=True)
    state, outputs = op.init_state(2, 4, 16, 5, **options), []
    for t in range(9):
        token = {
            name: x if name == "log_decay" and x.ndim == 1 else x[:, 0]
            for name, x in part(op, arguments, slice(t, t + 1)).items()
        }
        y, state = op.step(*(token.pop(name) for name in op.tokens), state, **token, **options, scale=0.3)
        outputs.append(y)
    assert_close((jnp.stack(outputs, axis=1), state), want)


@by_decay
def test_packed_segments_are_separate_runs(op, decay):
    arguments, _ = op.case("packing", batch=1, length=120, decay=decay, initial_state=True).arguments()
    first = arguments.pop("initial_state")
    borders = [0, 1, 37, 90, 120]
    ids = np.repeat([4, 7, 4, 0], np.diff(borders))[None]  # an id that comes back is a new segment
    got = op.run(**arguments, segment_ids=ids, initial_state=first, return_state=True)
    outputs = []
    for start, stop in itertools.pairwise(borders):
        tokens = part(op, arguments, slice(start, stop))
        y, state = op.run(**tokens, initial_state=first if start == 0 else None, return_state=True)
        outputs.append(y)
    assert_close(got, (jnp.concatenate(outputs, axis=1), state))


@by_decay
def test_no_gradient_from_later_tokens_nor_across_borders_of_segments(op, decay):
    arguments, _ = op.case("leak", batch=1, length=90, decay=decay, initial_state=True).arguments()
    ids = jnp.repeat(jnp.arange(3), 30)[None]

    def middle(k):
        return jnp.sum(op.run(**{**arguments, "k": k}, segment_ids=ids)[:, 30:50])

    gradient = np.asarray(jax.grad(middle)(arguments["k"]))[0]
    assert np.all(gradient[:30] == 0) and np.all(gradient[50:] == 0)
    assert np.all(np.any(gradient[30:50] != 0, axis=(1, 2)))


DECAYED = [(*pair, dtype) for pair in DECAYS if pair[1] is not None for dtype in ("float32", "bfloat16")]


@pytest.mark.parametrize(
    ("op", "decay", "dtype"),
    quick(DECAYED, ("linear-head-bfloat16", "linear-channel-float32", "delta_rule-token-bfloat16"), name),
)
def test_extreme_decays_stay_finite(op, decay, dtype):
    options = {"normalize": True} if op is LINEAR else {"beta": "wide"}
    arguments, options = op.case("extreme", length=150, decay=decay, **options).arguments(jnp.dtype(dtype))
    shape = arguments["log_decay"].shape
    choices = jnp.asarray([0.0, -20.0, -1e4, -1e38, -1e-30])
    arguments["log_decay"] = choices[jnp.arange(np.prod(shape)) % 5].reshape(shape)
    y, pullback = jax.vjp(lambda a: op.run(**a, **options).astype(jnp.float32), arguments)
    assert np.all(np.isfinite(y))
    assert all(np.all(np.isfinite(np.asarray(g, np.float32))) for g in jax.tree.leaves(pullback(y)))


@pytest.mark.parametrize(
    ("op", "decay"),
    quick([pair for pair in DECAYS if pair[1]], ("linear-head", "linear-channel", "delta_rule-head"), name),
)
def test_a_complete_decay_forgets_everything(op, decay):
    arguments, _ = op.case("forget", batch=1, length=100, decay=decay).arguments()
    decays = arguments.pop("log_decay")
    own = jnp.sum(arguments["q"] * arguments["k"], axis=-1, keepdims=True) * arguments["v"]
    want = arguments.get("beta", jnp.ones((1, 100, 2)))[..., None] * own
    nothing = jnp.full_like(decays, -jnp.inf)
    y, pullback = jax.vjp(lambda g: op.run(**arguments, log_decay=g), nothing)
    assert_close(y, want)
    assert not np.any(pullback(y)[0])
    token = [arguments[name][:, 50] for name in op.tokens]
    last = nothing if decay == "head" else nothing[:, 50]
    state = jnp.ones_like(op.init_state(1, 2, arguments["q"].shape[-1], arguments["v"].shape[-1]))
    assert_close(op.step(*token, state, log_decay=last)[0], want[:, 50])


@by_op
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_positive_log_decay_is_read_as_zero(op, implementation):
    arguments, _ = op.case("growth", length=40).arguments()
    got = op.run(**arguments, log_decay=jnp.full((2,), 0.5), implementation=implementation)
    assert_close(got, op.run(**arguments))


@by_op
@pytest.mark.parametrize("scale", [0.25, 0.0])
def test_scale_multiplies_outputs_and_has_a_gradient(op, scale):
    arguments, _ = op.case("scale", length=40).arguments()
    y = op.run(**arguments)
    assert_close(op.run(**arguments, scale=scale), scale * y)
    gradient = jax.grad(lambda s: jnp.vdot(op.run(**arguments, scale=s), y))(scale)
    np.testing.assert_allclose(gradient, jnp.vdot(y, y), rtol=1e-5)


@by_variant
@pytest.mark.parametrize("dtype", quick(["float16", "bfloat16", "float32"], ("bfloat16",)))
def test_outputs_have_the_dtype_of_the_inputs_and_states_are_float32(op, decay, options, dtype):
    def outputs(arguments):
        return op.run(**arguments, **options, return_state=True)

    arguments = op.case("dtypes", length=5, key_size=3, decay=decay, **options).arguments(jnp.dtype(dtype))[0]
    y, state = jax.eval_shape(outputs, arguments)
    assert y.dtype == dtype and {s.dtype for s in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}
    gradients = jax.eval_shape(jax.grad(lambda a: jnp.sum(outputs(a)[0].astype(jnp.float32))), arguments)
    assert jax.tree.map(lambda g: g.dtype, gradients) == jax.tree.map(lambda x: x.dtype, arguments)
    token = [arguments[name][:, 0] for name in op.tokens]
    y, state = op.step(*token, op.init_state(2, 2, 3, 3, **options), **options)
    assert y.dtype == dtype and {s.dtype for s in jax.tree.leaves(state)} == {jnp.dtype(jnp.float32)}


@by_op
def test_float64_is_accumulated_in_float64(op):
    with jax.enable_x64(True):
        arrays, options = op.case("double", length=200, decay="token", initial_state=True).arrays()
        got = op.run(**arrays, **options, return_state=True)
        want = op.run(**arrays, **options, return_state=True, implementation="reference")
        assert got[1].dtype == jnp.float64
        assert_close(got, want, 1e-14)
