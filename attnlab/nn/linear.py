"""Linear maps and convolutions with the library's dtype rule and logical axis names.

The rule: compute in `dtype` if it was given, else in the dtype of the input, whatever `param_dtype` the parameters are
stored in. (Flax's own layers promote a bfloat16 input to float32 when the parameters are float32.)

Logical axis names stand on each parameter as the metadata `logical_axes`, a name or None per array axis; they cost
nothing without a mesh, and `attnlab.training.sharding` turns them into shardings by rules. The names: `embed` (channels
of the token stream), `heads` (heads times head size), `mlp` (hidden channels of a feed-forward), `vocab`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from pallas_kernels.dtypes import at_least_float32

Axes = Sequence[str | None]
trunc_normal = nnx.initializers.truncated_normal(stddev=0.02)
fan_in_normal = nnx.initializers.lecun_normal()


def compute_in_input_dtype(arrays: tuple[Any, ...], /, *, dtype: Any = None, inexact: bool = True) -> tuple[Any, ...]:
    """Casts parameters to `dtype`, or to the dtype of the input, which is the first array."""
    dtype = jnp.result_type(arrays[0]) if dtype is None else dtype
    if inexact and not jnp.issubdtype(dtype, jnp.inexact):
        dtype = at_least_float32(dtype)
    return tuple(None if a is None else jnp.asarray(a, dtype) for a in arrays)


def _metadata(axes: Axes | None) -> dict[str, Any]:
    return {} if axes is None else {"logical_axes": tuple(axes)}


class Linear(nnx.Linear):
    """Affine map of the last axis, `(…, in_features)` to `(…, out_features)`.

    Args:
      in_features: channels that come in.
      out_features: channels that go out.
      use_bias: whether a bias is added.
      axes: logical names of the two axes of the kernel, for sharding.
      kernel_init: initialiser, normal with variance 1 / in_features unless given.
      bias_init: initialiser, zeros unless given.
      dtype: of the computation and the result; that of the input when None.
      param_dtype: of the parameters.
      rngs: stream `params`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        axes: Axes = ("embed", "embed"),
        kernel_init: nnx.Initializer = fan_in_normal,
        bias_init: nnx.Initializer = nnx.initializers.zeros,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            in_features,
            out_features,
            use_bias=use_bias,
            kernel_init=kernel_init,
            bias_init=bias_init,
            dtype=dtype,
            param_dtype=param_dtype,
            promote_dtype=compute_in_input_dtype,
            kernel_metadata=_metadata(axes),
            bias_metadata=_metadata(axes[1:]),
            rngs=rngs,
        )


class Conv(nnx.Conv):
    """Convolution over the token axes of `(B, *S, C)`; 1, 2 or 3 axes by the length of `kernel_size`.

    Padding is by zeros, `kernel_size // 2` on either side unless given as pairs or by name (`"SAME"`, `"VALID"`).
    `feature_group_count=in_features` makes it depthwise. The initialiser is uniform in ±1/√fan_in, as the papers' code
    has it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: Sequence[int],
        *,
        strides: int | Sequence[int] = 1,
        padding: Any = None,
        kernel_dilation: int | Sequence[int] = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        axes: Axes = ("embed", "embed"),
        kernel_init: nnx.Initializer | None = None,
        bias_init: nnx.Initializer | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        kernel_size = tuple(kernel_size)
        fan_in = in_features // feature_group_count
        for length in kernel_size:
            fan_in *= length
        super().__init__(
            in_features,
            out_features,
            kernel_size,
            strides=strides,
            padding=[(k // 2, k // 2) for k in kernel_size] if padding is None else padding,
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count,
            use_bias=use_bias,
            kernel_init=uniform_init(fan_in) if kernel_init is None else kernel_init,
            bias_init=uniform_init(fan_in) if bias_init is None else bias_init,
            dtype=dtype,
            param_dtype=param_dtype,
            promote_dtype=compute_in_input_dtype,
            kernel_metadata=_metadata((None,) * len(kernel_size) + tuple(axes)),
            bias_metadata=_metadata(axes[1:]),
            rngs=rngs,
        )


def uniform_init(fan_in: int) -> nnx.Initializer:
    """Uniform in ±1/√fan_in: what PyTorch gives its linear maps and convolutions."""
    bound = fan_in**-0.5

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
