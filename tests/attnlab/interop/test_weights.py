"""`attnlab.interop.load` and `export`: files in the authors' names."""

import numpy as np
import pytest
from flax import nnx

import attnlab.interop
from attnlab.interop import weights
from attnlab.interop.names import StateDictError
from attnlab.interop.official import Official
from attnlab.interop.torch_files import read_state_dict
from attnlab.models.tnl import TransNormerLLM
from attnlab.nn.linear import Linear
from attnlab.pooling.efficient_probing import EfficientProbing


def probing(seed=0):
    return EfficientProbing(8, num_queries=2, use_bias=True, rngs=nnx.Rngs(seed))


def test_an_exported_file_is_official_and_loads_back(tmp_path):
    model, other = probing(), probing(1)
    attnlab.interop.export(model, tmp_path / "probe.safetensors")
    arrays = read_state_dict(tmp_path / "probe.safetensors")
    assert {name: array.shape for name, array in arrays.items()} == {
        "cls_token": (1, 2, 8),
        "v.weight": (8, 8),
        "v.bias": (8,),
    }
    np.testing.assert_array_equal(arrays["v.weight"], model.value.kernel[...].T)
    attnlab.interop.load(other, tmp_path / "probe.safetensors")
    x = np.ones((1, 3, 8), np.float32)
    np.testing.assert_array_equal(other(x), model(x))
    attnlab.interop.load(other, arrays, symbol="EfficientProbing")
    with pytest.raises(ValueError, match="key='model' is for files"):
        attnlab.interop.load(other, arrays, key="model")


def test_a_class_of_several_official_names_is_told_by_the_arrays(tmp_path):
    model = TransNormerLLM(11, features=8, depth=1, num_heads=2, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"symbol must say which .* TransNormer or TransnormerForCausalLM"):
        attnlab.interop.export(model, tmp_path / "model.safetensors")
    for symbol, name in (("TransNormer", "transnormer.wte.weight"), ("TransnormerForCausalLM", "model.embed_tokens")):
        attnlab.interop.export(model, tmp_path / "model.safetensors", symbol=symbol)
        arrays = read_state_dict(tmp_path / "model.safetensors")
        assert any(one.startswith(name) for one in arrays)
        other = TransNormerLLM(11, features=8, depth=1, num_heads=2, rngs=nnx.Rngs(1))
        attnlab.interop.load(other, arrays)
        np.testing.assert_array_equal(other.embedding[...], model.embedding[...])
    with pytest.raises(StateDictError, match=r"as TransnormerForCausalLM: .* without a place here: extra"):
        attnlab.interop.load(model, arrays | {"extra": np.ones(1, np.float32)})


def test_what_nobody_described_is_refused():
    with pytest.raises(TypeError, match="no official weights are described for a Linear"):
        attnlab.interop.load(Linear(2, 2, rngs=nnx.Rngs(0)), {})
    with pytest.raises(TypeError, match="symbol must be one of EfficientProbing for a EfficientProbing, got 'EP'"):
        attnlab.interop.load(probing(), {}, symbol="EP")


def test_every_description_names_our_options_rightly():
    """What a string in `config` names is an argument of ours."""
    for official in weights.described():
        assert isinstance(official, Official)
        ours = official.takes()
        named = {option for option in official.config.values() if isinstance(option, str)} | set(official.always)
        assert ours is None or not named - ours, f"{official.symbol}: {sorted(named - ours)}"
