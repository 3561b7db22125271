"""timm's models and ours, with the same random weights: logits, and the features of every stage.

python -m pytest -m parity tests/parity          # where torch and timm are installed
"""

import jax
import numpy as np
import pytest
from flax import nnx

from attnlab.models import create
from tests.accuracy import relative_rms

pytestmark = pytest.mark.parity

# timm's name, ours, whether timm gives features of stages as we count them.
MODELS = [
    ("davit_tiny", "davit_tiny", True),
    ("maxvit_tiny_tf_224", "maxvit_tiny_tf_224", True),
    ("maxvit_tiny_rw_224", "maxvit_tiny_rw_224", True),
    ("halonet26t", "halonet26t", True),
    ("shvit_s1", "shvit_s1", True),
    ("mobilenetv1_100", "mobilenet_v1_100", False),
    ("deit_tiny_patch16_224", "deit_tiny", False),
    ("deit3_small_patch16_224", "deit3_small", False),
    ("vit_medium_patch16_reg4_gap_256", "vit_medium_patch16_reg4_gap_256", False),
    ("vit_small_patch14_reg4_dinov2", "vit_small_patch14_reg4_dinov2", False),
    ("cait_xxs24_224", "cait_xxs24_224", False),
    ("crossvit_9_240", "crossvit_9", False),
    ("crossvit_9_dagger_240", "crossvit_9_dagger", False),
]


@pytest.mark.parametrize(("theirs", "ours", "stages"), MODELS, ids=[theirs for theirs, _, _ in MODELS])
def test_logits_and_features(theirs, ours, stages):
    torch, timm = pytest.importorskip("torch"), pytest.importorskip("timm")
    torch.manual_seed(0)
    reference = timm.create_model(theirs, num_classes=11)
    _off_their_starts(torch, reference)
    reference.eval()
    arrays = {name: array.numpy() for name, array in reference.state_dict().items()}
    side = reference.pretrained_cfg["input_size"][-1]
    images = np.random.default_rng(0).standard_normal((2, side, side, 3)).astype(np.float32)
    with torch.no_grad():
        given = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
        want = reference(given).numpy()
        inside = reference.forward_intermediates(given, intermediates_only=True) if stages else []
        maps = [each.numpy() for each in inside]
    model = create(ours, num_classes=11, weights=arrays)
    graph, state = nnx.split(model)

    @jax.jit
    def both(state, x):
        model = nnx.merge(graph, state)
        return model(x), model.stages(x) if stages else ()

    logits, features = both(state, images)
    assert relative_rms(logits, want) < 2e-4
    assert len(maps) >= len(features)
    for got, each in zip(features, maps[-len(features) :], strict=False):
        assert relative_rms(got, each.transpose(0, 2, 3, 1)) < 2e-4


def _off_their_starts(torch, model):
    """Moves parameters and statistics a little, so that no scale is one and no bias zero by its start."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, each in model.state_dict().items():
            if each.is_floating_point():
                noise = torch.rand(each.shape, generator=generator) - 0.5
                scales = name.endswith("running_var") or each.ndim > 1
                each.copy_(each * (1 + 0.2 * noise) if scales else each + 0.1 * noise)
