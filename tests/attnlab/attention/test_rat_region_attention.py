"""Region attention: sorted and dense are one, a context, labels from masks, and the focal loss."""

import jax
import numpy as np
import pytest
from flax import nnx

from attnlab.attention.sparse.rat_region_attention import RegionAttention, paint_regions, region_attention
from attnlab.models.rat import RAT
from attnlab.objectives.focal_region import focal_region_loss
from tests.accuracy import relative_rms


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_sorted_blocks_are_the_dense_mask():
    """The paper's mask is -1000 between regions; labels may be any integers, and regions in pieces."""
    q, k, v = normal(3, 2, 24, 2, 4)
    labels = np.random.default_rng(1).choice([-7, 0, 5, 90], (2, 24)).astype(np.int32)
    mask = np.where(labels[:, None, :, None] == labels[:, None, None, :], 0.0, -1000.0)
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) * 0.7 + mask
    want = np.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores), v)
    for in_order in (False, True):
        got = region_attention(q, k, v, labels, scale=0.7, in_order=in_order)
        assert relative_rms(got, want) < 1e-5, in_order


def test_a_label_that_the_context_lacks_reads_zeros():
    layer = RegionAttention(8, num_heads=2, context_features=6, use_bias=False, rngs=nnx.Rngs(0))
    labels, other = np.asarray([[[0, 1], [1, 2]]], np.int32), np.asarray([[1, 0, 1]], np.int32)
    y = layer(normal(1, 2, 2, 8), labels, normal(1, 3, 6), other)
    assert not y[0, 1, 1].any() and np.asarray(y).any(-1).sum() == 3
    with pytest.raises(ValueError, match="context and its labels"):
        layer(normal(1, 2, 2, 8), labels)


def test_small_masks_are_painted_over_large_ones():
    masks = np.zeros((1, 3, 2, 4), bool)
    masks[0, 0, 0, :2] = masks[0, 1, 0] = masks[0, 2, :, 1] = True
    np.testing.assert_array_equal(paint_regions(masks)[0], [[2, 3, 1, 1], [4, 3, 4, 4]])


def test_the_loss_stresses_the_hardest_region_whatever_its_label():
    target, labels = np.zeros((1, 2, 2, 1), np.float32), np.asarray([[[900, 900], [-4, -4]]])
    prediction = np.asarray([0.1, 0.3, 0.5, 0.3], np.float32).reshape(1, 2, 2, 1)
    want = (0.1 + 0.3) * (2 * 0.2 / 0.4 + 1) / 4 + (0.5 + 0.3) * (2 + 1) / 4
    assert float(focal_region_loss(prediction, target, labels, beta=2.0)[0]) == pytest.approx(want)
    assert not focal_region_loss(target, target, labels).any()


def test_regions_of_an_image_are_seen_on_its_coarsest_grid():
    model = RAT(4, middle_depth=1, layers=1, encoder_depths=(1,), decoder_depths=(1,), num_heads=2, rngs=nnx.Rngs(0))
    labels = np.arange(64, dtype=np.int32).reshape(1, 8, 8)
    np.testing.assert_array_equal(model._regions(labels, (1, 4, 4))[0], labels[0, ::2, ::2])
    with pytest.raises(ValueError, match="multiples of 8"):
        model(normal(1, 12, 8, 1))
    with pytest.raises(ValueError, match="decoder_depths must be 2"):
        RAT(decoder_depths=(1,), rngs=nnx.Rngs(0))


@pytest.mark.slow
def test_the_defaults_are_those_of_the_authors():
    model = nnx.eval_shape(lambda: RAT(rngs=nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == 15_945_025
