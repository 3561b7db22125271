"""`Official` and its tables of names: what they load, dump, build and refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.interop.names import Interleaved, Mapped, Named, Part, Squeezed, StateDictError, resolve
from attnlab.interop.official import ConfigError, Official, Only, choose, options, runner, same_as
from attnlab.nn.depthwise import DepthwiseConv
from attnlab.nn.heads import FromHeads, ToHeads, WithinHeads
from attnlab.nn.linear import Conv, Linear
from attnlab.nn.mlp import MLP, LayerScale
from attnlab.nn.norms import BatchNorm, LayerNorm, RMSNorm


def draw(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


class Attention(nnx.Module):
    def __init__(self, features, heads=2, use_bias=True, *, rngs):
        shape = (features, heads, features // heads)
        self.query, self.key, self.value = (ToHeads(*shape, use_bias=use_bias, rngs=rngs) for _ in range(3))
        self.out = FromHeads(heads, features // heads, features, rngs=rngs)
        self.gain = nnx.data(None)


class Conv1(nnx.Module):
    def __init__(self, features, *, rngs):
        self.conv = Conv(features, features, (3,), rngs=rngs)


class Layer(nnx.Module):
    def __init__(self, features, mixer, *, rngs):
        self.norm = LayerNorm(features, rngs=rngs)
        self.mixer = mixer
        self.mlp = MLP(features, 2 * features, rngs=rngs)
        self.scale = LayerScale(features, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, features=4, depth=2, *, rngs):
        mixers = [Attention(features, rngs=rngs), Conv1(features, rngs=rngs)]
        self.token = nnx.Param(jnp.zeros((features,)))
        self.layers = nnx.List(Layer(features, mixer, rngs=rngs) for mixer in mixers[:depth])
        self.depth = depth

    def __call__(self, x):
        return x + self.token[...]


ATTENTION = Official(
    "Attention", Attention, names={("query", "key", "value"): "qkv", "out": "proj"}, ignore=("position_index",)
)
CONV = Official("Conv", Conv1)
MODEL = Official(
    "Model",
    Model,
    options(dim="features", act=Only("gelu")),
    {
        "token": Squeezed("cls_token", 0, 1),
        "layers.*": "blocks.*",
        "layers.*.norm": Named("blocks.*.ln", weight="gamma", bias="beta"),
        "layers.*.mixer": Part("blocks.*.attn", ATTENTION, CONV),
        "layers.*.scale": lambda i: f"scales.{i + 1}",
    },
    defaults={"dim": 4},
)


def arrays():
    return {
        "cls_token": draw(1, 1, 4),
        "blocks.0.attn.qkv.weight": draw(12, 4),
        "blocks.0.attn.qkv.bias": draw(12),
        "blocks.0.attn.proj.weight": draw(4, 4),
        "blocks.0.attn.proj.bias": draw(4),
        "blocks.1.attn.conv.weight": draw(4, 4, 3),
        "blocks.1.attn.conv.bias": draw(4),
        **{f"blocks.{i}.ln.gamma": draw(4) + i for i in range(2)},
        **{f"blocks.{i}.ln.beta": draw(4) - i for i in range(2)},
        **{f"blocks.{i}.mlp.fc1.weight": draw(8, 4) + i for i in range(2)},
        **{f"blocks.{i}.mlp.fc1.bias": draw(8) + i for i in range(2)},
        **{f"blocks.{i}.mlp.fc2.weight": draw(4, 8) + i for i in range(2)},
        **{f"blocks.{i}.mlp.fc2.bias": draw(4) + i for i in range(2)},
        **{f"scales.{i + 1}": draw(4) + i for i in range(2)},
    }


def model():
    return MODEL.build({})


def test_a_model_of_parts_is_loaded_and_dumped():
    made = model()
    MODEL.load(made, arrays() | {"blocks.0.attn.position_index": np.arange(3), "bn.num_batches_tracked": np.array(1)})
    mixer, given = made.layers[0].mixer, arrays()
    np.testing.assert_array_equal(made.token[...], given["cls_token"][0, 0])
    np.testing.assert_array_equal(made.layers[1].norm.bias[...], given["blocks.1.ln.beta"])
    np.testing.assert_array_equal(made.layers[1].scale.scale[...], given["scales.2"])
    x = draw(3, 4)
    want = x @ given["blocks.0.attn.qkv.weight"][4:8].T + given["blocks.0.attn.qkv.bias"][4:8]
    np.testing.assert_allclose(mixer.key(x).reshape(3, 4), want, rtol=1e-5, atol=1e-5)
    want = x @ given["blocks.0.attn.proj.weight"].T + given["blocks.0.attn.proj.bias"]
    np.testing.assert_allclose(mixer.out(x.reshape(3, 2, 2)), want, rtol=1e-5, atol=1e-5)
    dumped = MODEL.dump(made)
    assert dumped.keys() == given.keys()
    for name, array in given.items():
        np.testing.assert_array_equal(dumped[name], array)


@pytest.mark.parametrize(
    ("layer", "given"),
    [
        (Linear(3, 5, rngs=nnx.Rngs(0)), {"weight": (5, 3), "bias": (5,)}),
        (Linear(3, 5, use_bias=False, rngs=nnx.Rngs(0)), {"weight": (5, 3)}),
        (Conv(4, 6, (3, 5), feature_group_count=2, rngs=nnx.Rngs(0)), {"weight": (6, 2, 3, 5), "bias": (6,)}),
        (ToHeads(6, 2, 4, rngs=nnx.Rngs(0)), {"weight": (8, 6), "bias": (8,)}),
        (FromHeads(2, 4, 6, rngs=nnx.Rngs(0)), {"weight": (6, 8), "bias": (6,)}),
        (WithinHeads(2, 3, 4, rngs=nnx.Rngs(0)), {"weight": (8, 3, 1), "bias": (8,)}),
        (DepthwiseConv((2, 3), (3, 5), rngs=nnx.Rngs(0)), {"weight": (6, 1, 3, 5), "bias": (6,)}),
        (LayerNorm(4, rngs=nnx.Rngs(0)), {"weight": (4,), "bias": (4,)}),
        (RMSNorm(4, rngs=nnx.Rngs(0)), {"weight": (4,)}),
        (RMSNorm(4, use_scale=False, rngs=nnx.Rngs(0)), {}),
        (nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0)), {"weight": (4,), "bias": (4,)}),
        (
            BatchNorm(4, rngs=nnx.Rngs(0)),
            {"weight": (4,), "bias": (4,), "running_mean": (4,), "running_var": (4,)},
        ),
        (BatchNorm(4, use_affine=False, rngs=nnx.Rngs(0)), {"running_mean": (4,), "running_var": (4,)}),
        (nnx.Embed(7, 4, rngs=nnx.Rngs(0)), {"weight": (7, 4)}),
    ],
    ids=lambda part: type(part).__name__ if isinstance(part, nnx.Module) else "",
)
def test_layers_have_the_layout_of_pytorch(layer, given):
    rules = resolve(layer, {}, base="there")
    given = {f"there.{name}": draw(*shape) for name, shape in given.items()}
    rules.load(given)
    dumped = rules.dump()
    assert dumped.keys() == given.keys()
    for name, array in given.items():
        np.testing.assert_array_equal(dumped[name], array)


@pytest.mark.parametrize("spatial", [(3,), (3, 5), (1, 3, 3)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions_are_the_correlation_that_pytorch_computes(spatial, groups):
    n_in, n_out = 4, 8
    given = {"weight": draw(n_out, n_in // groups, *spatial), "bias": draw(n_out)}
    layer = Conv(n_in, n_out, spatial, padding="VALID", feature_group_count=groups, rngs=nnx.Rngs(0))
    resolve(layer, {}).load(given)
    x = draw(1, *spatial, n_in)  # one output position: a plain sum over window and input channels
    got = np.asarray(layer(x)).reshape(n_out)
    for o in range(n_out):
        group = o // (n_out // groups)
        window = np.moveaxis(x[0, ..., group * (n_in // groups) : (group + 1) * (n_in // groups)], -1, 0)
        want = (window * given["weight"][o]).sum() + given["bias"][o]
        np.testing.assert_allclose(got[o], want, rtol=1e-4, atol=1e-5)


def test_batch_norm_computes_with_the_running_statistics():
    layer = BatchNorm(4, rngs=nnx.Rngs(0))
    given = {"weight": draw(4), "bias": -draw(4), "running_mean": 2 * draw(4), "running_var": draw(4) ** 2 + 0.1}
    resolve(layer, {}).load(given)
    x = draw(3, 4)
    want = (x - given["running_mean"]) / np.sqrt(given["running_var"] + 1e-5) * given["weight"] + given["bias"]
    np.testing.assert_allclose(layer(x), want, rtol=1e-5, atol=1e-5)


def test_rows_go_one_after_the_other_or_head_by_head():
    """Official rows are numbered; heads 2, head size 2: where do the rows of the key's second head stand?"""
    rows = np.repeat(np.arange(12, dtype=np.float32)[:, None], 4, axis=1)
    given = {"qkv.weight": rows, "qkv.bias": rows[:, 0]}
    three = {("query", "key", "value"): "qkv", "out": None}
    for table, second in ((three, [6, 7]), (three | {("query", "key", "value"): Interleaved("qkv")}, [8, 9])):
        made = Attention(4, rngs=nnx.Rngs(0))
        rules = resolve(made, table)
        rules.load(given)
        np.testing.assert_array_equal(made.key.bias[1], second)
        np.testing.assert_array_equal(made.key.kernel[3, 1], second)
        for name, array in rules.dump().items():
            np.testing.assert_array_equal(array, given[name])


def test_several_official_layers_make_one_of_ours():
    made = Linear(4, 6, rngs=nnx.Rngs(0))
    rules = resolve(nnx.List([made]), {"0": ("k", "v")})
    given = {"k.weight": draw(3, 4), "k.bias": draw(3), "v.weight": -draw(3, 4), "v.bias": -draw(3)}
    rules.load(given)
    np.testing.assert_array_equal(made.kernel[...].T, np.concatenate([given["k.weight"], given["v.weight"]]))
    np.testing.assert_array_equal(made.bias[...], np.concatenate([given["k.bias"], given["v.bias"]]))
    assert all(np.array_equal(array, given[name]) for name, array in rules.dump().items())


def test_a_weight_may_have_another_shape_there():
    made = Linear(4, 6, rngs=nnx.Rngs(0))
    rules = resolve(nnx.List([made]), {"0": Squeezed("conv", 2, 3)})
    given = {"conv.weight": draw(6, 4, 1, 1), "conv.bias": draw(6)}
    rules.load(given)
    np.testing.assert_array_equal(made.kernel[...].T, given["conv.weight"][:, :, 0, 0])
    assert rules.dump()["conv.weight"].shape == (6, 4, 1, 1)
    with pytest.raises(StateDictError, match=r"'conv.weight' has shape \(6, 4, 3, 3\); 0.kernel here needs \(6, 4, 1"):
        rules.load(given | {"conv.weight": draw(6, 4, 3, 3)})

    token = nnx.List([nnx.Param(jnp.zeros((2, 3)))])
    rules = resolve(token, {"0": Mapped("t", lambda a: a.reshape(2, 3), jnp.ravel)})
    rules.load({"t": np.arange(6.0, dtype=np.float32)})
    np.testing.assert_array_equal(token[0][1], [3, 4, 5])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"blocks.0.attn.qkv.bias": None}, "the state dict has no 'blocks.0.attn.qkv.bias'"),
        ({"head.weight": draw(2)}, "official arrays without a place here: head.weight"),
        (
            {"cls_token": None, "cls_tokens": draw(1, 1, 4)},
            r"no 'cls_token' \(did you mean 'cls_tokens'\?\); .* here: cls_tokens",
        ),
        (
            {"blocks.0.attn.qkv.weight": draw(9, 4)},
            r"qkv.weight' has shape \(9, 4\); query.kernel and key.kernel and value.kernel here needs \(12, 4\)",
        ),
        ({"cls_token": np.zeros((1, 1, 4), np.int32)}, "'cls_token' is int32; the parameter here is float32"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_changes(change, says):
    made = model()
    before = MODEL.dump(made)
    given = {name: array for name, array in (arrays() | change).items() if array is not None}
    with pytest.raises(StateDictError, match=says):
        MODEL.load(made, given)
    for name, array in MODEL.dump(made).items():
        np.testing.assert_array_equal(array, before[name])


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"tokens": "cls"}, r"Model has no part 'tokens' \(tokens\): did you mean token"),
        ({"layers.*.mixer": Part("attn", CONV)}, "'attn' is one of Conv1 there, here it is a Attention"),
        ({"layers.*.mlp": Squeezed("mlp", 0)}, "layers.0.mlp, a MLP, is named like a layer or parameter"),
        ({("layers.0.norm", "token"): "x"}, r"'x' is one layer there; here layers.0.norm has weight, bias and token"),
        ({("layers.0.norm", "layers.1.norm"): Interleaved("x")}, "'x' goes head by head there; layers.0.norm"),
    ],
)
def test_tables_that_do_not_fit_the_module_are_refused(table, says):
    with pytest.raises(StateDictError, match=says):
        resolve(model(), table)


def test_a_parameter_without_counterpart_keeps_its_value():
    made = nnx.List([nnx.Param(jnp.ones(2)), nnx.Param(jnp.ones(2))])
    rules = resolve(made, {"0": None})
    rules.load({"1": draw(2)})
    np.testing.assert_array_equal(made[0][...], np.ones(2))
    assert list(rules.dump()) == ["1"]


def test_values_are_cast_to_the_parameters_dtypes():
    made = nnx.List([nnx.Param(jnp.zeros((4,), jnp.bfloat16))])
    resolve(made, {}).load({"0": draw(4).astype(np.float64)})
    np.testing.assert_array_equal(made[0][...], draw(4).astype(jnp.bfloat16))


def test_gradients_flow_to_the_official_arrays():
    x = draw(2, 4)

    def loss(given):
        made = model()
        MODEL.load(made, given)
        mixer = made.layers[0].mixer
        return jnp.sum(jnp.sin(mixer.out(mixer.query(x) * mixer.key(x)) + made.token[...]))

    given = {name: jnp.asarray(array) for name, array in arrays().items()}
    both = jax.jit(jax.value_and_grad(loss))
    _, grads = both(given)
    for name in ("blocks.0.attn.qkv.weight", "blocks.0.attn.proj.bias", "cls_token"):
        direction, step = draw(*given[name].shape), 1e-2
        ahead, behind = (both(given | {name: given[name] + s * step * direction})[0] for s in (1, -1))
        slope = (ahead - behind) / (2 * step)
        np.testing.assert_allclose(jnp.vdot(grads[name], direction), slope, rtol=2e-2, atol=1e-2)


def test_options_are_translated_and_unknown_ones_refused():
    assert MODEL.options({"depth": 1, "dropout": 0.5, "act": "gelu"}) == {"depth": 1, "features": 4}
    assert len(MODEL.build({"depth": 1}).layers) == 1
    assert Official("Model", Model).options({"features": 4, "depth": 1}) == {"features": 4, "depth": 1}
    with pytest.raises(ConfigError, match="Model has no option 'rngs' here"):
        MODEL.options({"rngs": 0})
    with pytest.raises(ConfigError, match="Model has no option 'dmi' here: did you mean dim"):
        MODEL.options({"dmi": 4})
    with pytest.raises(ConfigError, match="Model: act must be 'gelu' here, got 'relu'"):
        MODEL.options({"act": "relu"})
    whole = Official("F", Model, {"a": lambda given: {"depth": given["a"] + given["b"]}, "b": None}, defaults={"b": 2})
    assert whole.options({"a": 1}) == {"depth": 3}
    equal = Official("F", Model, {"qk_dim": same_as("qk_dim", "dim"), "dim": "features"})
    assert equal.options({"qk_dim": None, "dim": 4}) == equal.options({"qk_dim": 4, "dim": 4}) == {"features": 4}
    with pytest.raises(ConfigError, match="qk_dim must be equal to dim here, got 2 and 4"):
        equal.options({"qk_dim": 2, "dim": 4})


def test_classes_may_be_named_by_their_registration_and_hand_options_on():
    probing = Official("EP", "efficient_probing", {"dim": "features"})
    assert probing.build({"dim": 8, "num_queries": 2}).num_queries == 2
    assert probing.describes(probing.build({"dim": 8, "num_queries": 2}))

    class Wider(Model):
        def __init__(self, *, width=1, rngs, **options):
            super().__init__(rngs=rngs, **options)

    assert Official("W", Wider).takes() == {"width", "features", "depth"}
    assert Official("W", functools.partial(Wider, width=2)).build({"depth": 1}).depth == 1
    with pytest.raises(ConfigError, match="no option 'height'"):
        Official("W", Wider).options({"height": 1})


def test_several_classes_of_one_name_are_told_apart_by_options_or_names():
    wide = Official("Model", Model, {"width": "features"}, when="width")
    deep = Official("Model", Model, {"dim": "features"}, when=lambda given: given["depth"] > 8, defaults={"depth": 2})
    other = Official("Model", Model, {"dim": "features"})
    assert choose([wide, deep, other], "Model", {"width": 1}, ()) is wide
    assert choose([wide, deep, other], "Model", {"depth": 9}, ()) is deep
    assert choose([wide, deep, other], "Model", {"depth": 1}, ()) is other
    with pytest.raises(ConfigError, match=r"Other is not described: {'depth': 1}"):
        choose([wide, other], "Other", {"depth": 1}, ())
    with pytest.raises(ConfigError, match="Model is not described for these options"):
        choose([wide], "Model", {"depth": 1}, ())
    plain = Official("Model", Model, options("depth", dim="features"))
    assert choose([plain, MODEL], "Model", {"depth": 2}, arrays()) is MODEL
    with pytest.raises(StateDictError, match="as Model: the state dict has no 'cls_token'"):
        choose([plain, MODEL], "Model", {"depth": 2}, arrays().keys() - {"cls_token"})


def test_a_runner_builds_loads_and_calls():
    run = runner([MODEL, Official("add", lambda x, y, scale=1: scale * x + y, options("scale"))])
    meta = {"class": "Model", "config": {"dim": 4}, "call": {}, "inputs": ["x"]}
    np.testing.assert_array_equal(run(meta, arrays(), {"x": jnp.ones(4)})["y"], 1 + arrays()["cls_token"][0, 0])
    meta = {"class": "add", "config": {}, "call": {"scale": 3}, "inputs": ["x", "y"]}
    assert run(meta, {}, {"y": jnp.float32(1), "x": jnp.float32(2)})["y"] == 7
    with pytest.raises(StateDictError, match="without a place here: w"):
        run(meta, {"w": jnp.ones(1)}, {"x": jnp.ones(1), "y": jnp.ones(1)})
