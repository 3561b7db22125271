"""What the op refuses: by the name of the argument, what came, and what is allowed."""

import jax.numpy as jnp
import pytest

from pallas_kernels import block_sparse_attention
from pallas_kernels.array_masks import ArrayMask, Chosen
from pallas_kernels.block_sparse_attention import Blocks, Indexed, ScoreMod
from pallas_kernels.masks import Causal, Full, PerHead

Q = jnp.zeros((2, 10, 4, 8))
K = jnp.zeros((2, 12, 2, 8))


def mod(*arrays):
    return ScoreMod(lambda s, *_: s, arrays)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"q": Q[0]}, ValueError, r"q must be \(B, N, H, D\), got shape \(10, 4, 8\)"),
        ({"v": K.astype(jnp.bfloat16)}, TypeError, "one dtype, got float32, float32 and bfloat16"),
        ({"q": Q[:, :, :3]}, ValueError, "multiple of the heads of k, got 3 and 2"),
        ({"mask": lambda i, j: i}, TypeError, "mask must be"),
        ({"mask": PerHead((Causal(), Full()))}, ValueError, "2 rules for the 4 heads"),
        ({"mask": PerHead((ArrayMask(jnp.less),) * 4)}, ValueError, "PerHead takes masks of indices"),
        ({"mask": ArrayMask(jnp.less, (jnp.zeros((2, 3, 10)),))}, ValueError, "queries of an ArrayMask must be"),
        ({"mask": Chosen(jnp.zeros((2, 4, 10, 3)), 4)}, ValueError, "table of Chosen must be booleans"),
        ({"mask": Chosen(jnp.zeros((2, 4, 10, 3), bool), jnp.zeros((2, 11), int))}, ValueError, "groups of Chosen"),
        ({"blocks": jnp.zeros((1, 1, 2, 3), bool)}, TypeError, "blocks must be"),
        ({"blocks": Blocks.from_booleans(jnp.ones((1, 1, 2, 3), bool), 4, 4)}, ValueError, r"\(B\|1, H\|G\|1, 3, W\)"),
        ({"blocks": Blocks.from_booleans(jnp.ones((1, 3, 3, 3), bool), 4, 4)}, ValueError, "H of 1 or 2 or 4"),
        ({"blocks": Blocks.from_booleans(jnp.ones((1, 1, 3, 4), bool), 4, 4)}, ValueError, "lists 4 key blocks"),
        ({"segment_ids": jnp.zeros((2, 10), int)}, ValueError, "segment_ids must be"),
        ({"segment_ids": (jnp.zeros((2, 10)), jnp.zeros((2, 12)))}, TypeError, "must be integers, got float32"),
        ({"bias": jnp.zeros((1, 1, 10, 11))}, ValueError, "bias must be"),
        ({"score_mod": mod(jnp.zeros(4))}, TypeError, "must be Indexed"),
        ({"score_mod": mod(Indexed(jnp.zeros((4, 2)), "h b"))}, ValueError, "must name its axes"),
        ({"score_mod": mod(Indexed(jnp.zeros(3), "h"))}, ValueError, "must have sizes"),
        ({"score_mod": mod(Indexed(jnp.zeros(3), "j//5"))}, None, ""),
        ({"score_mod": mod(Indexed(jnp.zeros(2), "j//5"))}, ValueError, "at least 3 entries"),
        ({"score_mod": mod(Indexed(jnp.zeros(2), "id[j]"))}, ValueError, "needs ids"),
        ({"scale": jnp.zeros(2)}, ValueError, "scale must be a floating scalar"),
        ({"scale": float("inf")}, ValueError, "scale must be finite"),
        ({"softcap": -1.0}, ValueError, "softcap must be positive"),
        ({"sinks": jnp.zeros(2)}, ValueError, "sinks must be"),
        ({"implementation": "xal"}, ValueError, "did you mean 'xla'"),
    ],
)
def test_refusals(options, error, message):
    arrays = {"q": Q, "k": K, "v": K}
    if error is None:
        assert block_sparse_attention(**arrays | options).shape == Q.shape
        return
    with pytest.raises(error, match=message):
        block_sparse_attention(**arrays | options)


def test_blocks_of_another_kind():
    with pytest.raises(TypeError, match="visible must be boolean"):
        Blocks.from_booleans(jnp.ones((1, 1, 2, 2)), 4, 4)
    with pytest.raises(TypeError, match="indices must be integers"):
        Blocks.from_indices(jnp.ones((1, 1, 2, 2)), 4, 4)
