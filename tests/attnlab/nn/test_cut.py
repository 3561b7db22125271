"""The cut in the backward pass of a residual stream."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnlab.models.vit import ViT
from attnlab.nn.cut import cut_cotangent
from pallas_kernels import dispatch


def test_changes_no_value_and_no_derivative():
    x, t = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)

    def f(x, through):
        return jnp.sin(through(x)).sum() * through(x).sum()

    def all_of_it(through):
        def g(x):
            return f(x, through)

        hessian = jax.jvp(jax.grad(g), (x,), (t,))[1]
        again = jax.grad(lambda x: (jax.grad(jax.remat(g))(x) * t).sum())(x)
        return g(x), jax.jvp(g, (x,), (t,))[1], jax.grad(g)(x), hessian, again, jax.vmap(jax.grad(g))(x)

    for mine, expected in zip(all_of_it(cut_cotangent), all_of_it(lambda x: x), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-6)


def largest_fusion(depth):
    model = ViT((8, 8), 4, patch_size=2, features=8, depth=depth, num_heads=2, mlp_ratio=1.0, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    gradient = jax.grad(lambda params, images: nnx.merge(graph, params, rest, copy=True)(images).sum())
    program = jax.jit(gradient).lower(params, images).compile().as_text()
    return max(part.count("\n") for part in re.split(r"\n\n", program) if "fused_computation" in part[:40])


def test_the_backward_pass_of_a_model_does_not_grow_faster_than_its_depth():
    assert largest_fusion(5) == largest_fusion(3)


def test_is_for_cpus_alone():
    def program(platform):
        with dispatch.target(platform, device_kind="TPU v5e" if platform == "tpu" else None):
            return str(jax.make_jaxpr(jax.grad(lambda x: (cut_cotangent(x) ** 2).sum()))(jnp.ones(3)))

    assert "scan" in program("cpu") and "scan" not in program("tpu")
