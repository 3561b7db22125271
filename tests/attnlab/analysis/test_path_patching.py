import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.analysis.path_patching import logit_difference, path_patching
from attnlab.measure import watch
from attnlab.models.language_model import LanguageModel

RANDOM = np.random.default_rng(0)
CLEAN, CORRUPTED = RANDOM.integers(0, 11, (2, 2, 6))
ANSWERS = np.array([[1, 2], [3, 4]])


def model(**options):
    return LanguageModel(11, features=8, depth=2, num_heads=2, rngs=nnx.Rngs(0), **options)


def test_heads_of_the_last_layer_act_on_the_last_stream_directly():
    lm = model(without={"mlp": [1]})
    found = path_patching(lm, CLEAN, CORRUPTED, ANSWERS, [("stream", 2)])
    (logits, seen), (others, other) = (watch(lm, ids) for ids in (CLEAN, CORRUPTED))
    np.testing.assert_allclose(found.clean, logit_difference(logits, ANSWERS), rtol=1e-5)
    np.testing.assert_allclose(found.corrupt, logit_difference(others, ANSWERS), rtol=1e-5)
    last = seen["tokens"][1].x[:, -1]
    for head in range(2):
        change = other["heads"][1][:, -1, head] - seen["heads"][1][:, -1, head]
        moved = last + change @ lm.blocks.blocks[1].mixer.out.kernel[head]
        patched = logit_difference((lm.norm(moved) @ lm.embedding[...].T)[:, None], ANSWERS)
        want = (patched - found.clean) / (found.corrupt - found.clean)
        np.testing.assert_allclose(found.effect[1, head], want, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_receivers_take_nothing_from_themselves_or_from_what_comes_after():
    lm = model()
    by_query = path_patching(lm, CLEAN, CORRUPTED, ANSWERS, [(1, 0)], component="q", double=True)
    assert by_query.effect[0].any() and not by_query.effect[1].any()
    output = path_patching(lm, CLEAN, CORRUPTED, ANSWERS, [(1, 0), (0, 1)], component="z", truncate=False)
    assert output.effect[1, 0] == output.effect[0, 1] == 0
    frozen = path_patching(lm, CLEAN, CORRUPTED, ANSWERS, [("stream", 2)], freeze_mlps=True)
    free = path_patching(lm, CLEAN, CORRUPTED, ANSWERS, [("stream", 2)])
    assert not np.allclose(frozen.effect, free.effect, atol=1e-3)
    early = path_patching(lm, CLEAN, CORRUPTED, ANSWERS, [("stream", 1)])
    assert early.effect[0].any() and np.abs(early.effect[1]).max() < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"receivers": []}, "receivers must be heads or streams"),
        ({"receivers": [("stream", 1), (0, 0)]}, "receivers must be heads or streams"),
        ({"receivers": [(2, 0)]}, "among 2 layers"),
        ({"component": "m"}, "component must be q, k, v or z"),
        ({"position": 6}, "position must be one of 6"),
        ({"answers": jnp.ones((2, 3), int)}, "answers must be"),
    ],
)
def test_refuses_what_does_not_fit(options, message):
    given = {"answers": ANSWERS, "receivers": [(0, 0)]} | options
    with pytest.raises(ValueError, match=message):
        path_patching(model(), CLEAN, CORRUPTED, **given)
