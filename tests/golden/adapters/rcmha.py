"""Golden adapter of `rcmha`."""

import jax.numpy as jnp

from attnlab.interop.official import runner
from attnlab.interop.rcmha import OFFICIAL


def whole(meta, param, inputs):
    """The state dict: of both tables the files hold the rows that their lengths use, `P - K` to `P + N`."""
    queries = inputs["x"].shape[1]
    keys = queries + (inputs["mem"].shape[1] if "mem" in inputs else 0)
    arrays = dict(param)
    for name in param.keys() & {"key_pos_embeddings", "key_pos_bias"}:
        rows, middle = jnp.asarray(param[name]), meta["config"]["P"]
        table = jnp.zeros((2 * middle, *rows.shape[1:]), rows.dtype)
        arrays[name] = table.at[middle - keys : middle + queries].set(rows)
    return arrays


def run(meta, param, inputs):
    return runner(OFFICIAL)(meta, whole(meta, param, inputs), inputs)
