"""Masks, packed segments and causality, for the mixers that take them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnlab import Layout
from tests.conformance.subjects import Subject, accepts, close, flat, mixers


def those(taking: str | None = None, **wanted) -> pytest.MarkDecorator:
    chosen = [
        subject
        for subject in mixers()
        if all(getattr(subject, name) == value for name, value in wanted.items())
        and (taking is None or taking in accepts(subject))
    ]
    return pytest.mark.parametrize("subject", chosen, ids=str)


@those(causal=True)
def test_causality_by_gradients(subject: Subject):
    """The gradient of token i, in row-major order, reaches no later token, and reaches its own."""
    mixer, arguments = subject.build(), subject.arguments(subject.tokens(batch=1))
    gradient = jax.jit(lambda a, i: jax.grad(lambda a: jnp.sum(jnp.sin(flat(mixer(*a))[:, i])))(a))
    for i in (0, 4, flat(arguments[0]).shape[1] - 1):
        gradients = [flat(part) for part in gradient(arguments, i)]
        for part in gradients:
            assert not jnp.any(part[:, i + 1 :]), f"token {i} sees the future"
        assert jnp.any(gradients[-1][:, i]), f"token {i} does not see itself"


@those(taking="key_mask", layout=Layout.SEQUENCE)
def test_key_mask_is_as_if_the_tokens_were_not_there(subject: Subject):
    mixer, (x, *context) = subject.build(), subject.arguments(subject.tokens())
    real = 7
    keep = jnp.arange(x.shape[1])[None] < real
    mask = jnp.broadcast_to(keep, x.shape[:2])
    masked = mixer(x, *context, mask=mask)[:, :real]
    if subject.cross and not subject.causal:
        alone = mixer(x, *(c[:, :real] for c in context))[:, :real]
    else:
        alone = mixer(x[:, :real], *(c[:, :real] for c in context))
    close(masked, alone)
    source = (context or [x])[0]
    other = jnp.where(keep[..., None], source, 10 * source + 1)
    changed = mixer(x, other, mask=mask) if context else mixer(other, mask=mask)
    np.testing.assert_allclose(changed[:, :real], masked, rtol=1e-5, atol=1e-6)


@those(taking="mask")
def test_full_mask(subject: Subject):
    mixer, arguments = subject.build(), subject.arguments(subject.tokens())
    tokens = int(np.prod(arguments[0].shape[1:-1]))
    close(mixer(*arguments, mask=jnp.ones((1, 1, tokens, tokens), bool)), mixer(*arguments))
    keys = jnp.arange(tokens) % 3 != 1
    full = jnp.broadcast_to(keys, (1, 1, tokens, tokens))
    by_key = jnp.broadcast_to(keys, (arguments[0].shape[0], tokens))
    close(mixer(*arguments, mask=full), mixer(*arguments, mask=by_key))


@those(taking="mask", layout=Layout.SEQUENCE)
def test_row_without_keys_is_zero(subject: Subject):
    tokens = subject.tokens().shape[1]
    check_zero_rows(subject, jnp.ones((1, 1, tokens, tokens), bool).at[:, :, 3].set(False), slice(3, 4))


@those(taking="key_mask", layout=Layout.SEQUENCE)
def test_example_without_keys_is_zero(subject: Subject):
    x = subject.tokens()
    check_zero_rows(subject, jnp.ones(x.shape[:2], bool).at[0].set(False), slice(None))


def check_zero_rows(subject: Subject, mask: jax.Array, rows: slice):
    """With its initial biases of zero, the whole mixer gives zeros where no key may be seen, and zero gradients."""
    mixer, arguments = subject.build(noise=False), subject.arguments(subject.tokens())
    y = mixer(*arguments, mask=mask)
    assert jnp.isfinite(y).all()
    assert not jnp.any(y[0, rows])
    gradients = jax.grad(lambda a: jnp.sum(mixer(*a, mask=mask)[0, rows] * 3.0))(arguments)
    for gradient in gradients:
        assert jnp.isfinite(gradient).all()
        assert not jnp.any(gradient)


@those(taking="segment_ids", layout=Layout.SEQUENCE)
def test_packed_segments_equal_separate_runs(subject: Subject):
    mixer, (x, *context) = subject.build(), subject.arguments(subject.tokens())
    lengths = (5, 1, 6)
    ids = jnp.asarray(np.repeat([3, 7, 8], lengths))[None].repeat(x.shape[0], 0)
    packed = mixer(x, *context, segment_ids=(ids, ids) if context else ids)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        close(packed[:, part], mixer(x[:, part], *(c[:, part] for c in context)))
        start += length


@those(taking="positions", layout=Layout.SEQUENCE)
def test_positions_default_to_the_order(subject: Subject):
    mixer, arguments = subject.build(), subject.arguments(subject.tokens())
    order = jnp.broadcast_to(jnp.arange(arguments[0].shape[1]), arguments[0].shape[:2])
    close(mixer(*arguments, positions=order), mixer(*arguments))
    stretched = mixer(*arguments, positions=3 * order)
    assert not np.allclose(stretched, mixer(*arguments), rtol=1e-3, atol=1e-5)
