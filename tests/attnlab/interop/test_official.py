import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnlab.interop import official
from attnlab.nn.linear import Conv, Linear
from attnlab.nn.norms import BatchNorm, LayerNorm, RMSNorm


def draw(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def linear_layer(n_in, n_out, **options):
    return Linear(n_in, n_out, rngs=nnx.Rngs(0), **options)


class Block(nnx.Module):
    def __init__(self, rngs):
        self.qkv = Linear(4, 12, rngs=rngs)
        self.norm = LayerNorm(4, rngs=rngs)
        self.token = nnx.Param(jnp.zeros((4,)))


def block_dict():
    return {
        "blocks.0.attn.qkv.weight": draw(12, 4),
        "blocks.0.attn.qkv.bias": draw(12),
        "blocks.0.norm1.weight": draw(4),
        "blocks.0.norm1.bias": draw(4),
        "cls_token": draw(1, 1, 4),
    }


def load_block(block, arrays, **options):
    with official.StateDict(arrays, into=block, **options) as weights:
        official.linear(block.qkv, weights.sub("blocks.0"), "attn.qkv")
        official.norm(block.norm, weights, "blocks.0.norm1")
        official.param(block.token, weights, "cls_token", lambda a: a[0, 0])


def test_linear_computes_x_times_weight_transposed_plus_bias():
    arrays, x = {"fc.weight": draw(5, 3), "fc.bias": draw(5)}, draw(2, 3)
    layer = linear_layer(3, 5)
    with official.StateDict(arrays, into=layer) as weights:
        official.linear(layer, weights, "fc")
    np.testing.assert_allclose(layer(x), x @ arrays["fc.weight"].T + arrays["fc.bias"], rtol=1e-5, atol=1e-6)


def test_linear_takes_convolutions_of_size_one_and_permuted_rows():
    weight, order = draw(6, 3, 1, 1), np.array([5, 0, 3, 1, 2, 4])
    layer = linear_layer(3, 6, use_bias=False)
    with official.StateDict({"weight": weight}, into=layer) as weights:
        official.linear(layer, weights, "", rows=lambda a: a[order])
    np.testing.assert_array_equal(layer.kernel[...], weight[order, :, 0, 0].T)


def test_linear_refuses_a_true_convolution():
    with pytest.raises(official.StateDictError, match=r"'weight' has shape \(6, 3, 3, 3\); a linear map needs"):
        official.linear(linear_layer(3, 6, use_bias=False), official.StateDict({"weight": draw(6, 3, 3, 3)}), "")


def test_linears_share_out_rows_and_joined_linear_puts_them_together():
    arrays = {"in_proj_weight": draw(12, 4), "in_proj_bias": draw(12)}
    parts = [linear_layer(4, 6), linear_layer(4, 2), linear_layer(4, 4)]
    with official.StateDict(arrays) as weights:
        official.linears(parts, weights, "", weight="in_proj_weight", bias="in_proj_bias")
    np.testing.assert_array_equal(jnp.concatenate([p.kernel[...] for p in parts], 1), arrays["in_proj_weight"].T)
    np.testing.assert_array_equal(jnp.concatenate([p.bias[...] for p in parts]), arrays["in_proj_bias"])
    np.testing.assert_array_equal(parts[1].bias[...], arrays["in_proj_bias"][6:8])

    arrays = {"q.weight": draw(4, 4), "q.bias": draw(4), "kv.weight": draw(8, 4), "kv.bias": draw(8)}
    whole = linear_layer(4, 12)
    with official.StateDict(arrays, into=whole) as weights:
        official.joined_linear(whole, weights, ("q", "kv"))
    np.testing.assert_array_equal(whole.kernel[...][:, :4], arrays["q.weight"].T)
    np.testing.assert_array_equal(whole.bias[...][4:], arrays["kv.bias"])


def test_linears_refuse_rows_that_do_not_add_up():
    parts = [linear_layer(4, 6), linear_layer(4, 2)]
    weights = official.StateDict({"qkv.weight": draw(12, 4), "qkv.bias": draw(12)})
    with pytest.raises(official.StateDictError, match=r"'qkv.weight' has 12 output channels; here they are \[6, 2\]"):
        official.linears(parts, weights, "qkv")


@pytest.mark.parametrize("spatial", [(3,), (3, 5), (1, 3, 3)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_conv_is_the_correlation_that_pytorch_computes(spatial, groups):
    n_in, n_out = 4, 8
    arrays = {"dwc.weight": draw(n_out, n_in // groups, *spatial), "dwc.bias": draw(n_out)}
    layer = Conv(n_in, n_out, spatial, padding="VALID", feature_group_count=groups, rngs=nnx.Rngs(0))
    with official.StateDict(arrays, into=layer) as weights:
        official.conv(layer, weights, "dwc")
    x = draw(1, *spatial, n_in)  # one output position: a plain sum over window and input channels
    got = np.asarray(layer(x)).reshape(n_out)
    for o in range(n_out):
        group = o // (n_out // groups)
        window = np.moveaxis(x[0, ..., group * (n_in // groups) : (group + 1) * (n_in // groups)], -1, 0)
        want = (window * arrays["dwc.weight"][o]).sum() + arrays["dwc.bias"][o]
        np.testing.assert_allclose(got[o], want, rtol=1e-4, atol=1e-5)


def test_norms_and_embeddings():
    layer, rms = LayerNorm(4, rngs=nnx.Rngs(0)), RMSNorm(4, rngs=nnx.Rngs(0))
    batch = BatchNorm(4, rngs=nnx.Rngs(0))
    table = nnx.Embed(7, 4, rngs=nnx.Rngs(0))
    arrays = {
        "ln.gamma": draw(4),
        "ln.beta": draw(1, 4)[0],
        "rms.weight": draw(4),
        "bn.weight": draw(4),
        "bn.bias": -draw(4),
        "bn.running_mean": 2 * draw(4),
        "bn.running_var": draw(4) ** 2 + 0.1,
        "bn.num_batches_tracked": np.array(5),
        "wte.weight": draw(7, 4),
    }
    with official.StateDict(arrays) as weights:
        official.norm(layer, weights, "ln", weight="gamma", bias="beta")
        official.norm(rms, weights, "rms")
        official.norm(LayerNorm(4, use_scale=False, use_bias=False, rngs=nnx.Rngs(0)), weights, "none")
        official.batch_norm(batch, weights, "bn")
        official.embedding(table, weights, "wte")
    np.testing.assert_array_equal(layer.scale[...], arrays["ln.gamma"])
    np.testing.assert_array_equal(layer.bias[...], arrays["ln.beta"])
    np.testing.assert_array_equal(rms.scale[...], arrays["rms.weight"])
    np.testing.assert_array_equal(table(np.array([3])), arrays["wte.weight"][3:4])
    x = draw(3, 4)
    want = (x - arrays["bn.running_mean"]) / np.sqrt(arrays["bn.running_var"] + 1e-5) * arrays["bn.weight"]
    np.testing.assert_allclose(batch(x), want + arrays["bn.bias"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("here", [True, False])
def test_a_bias_on_one_side_only_is_refused(here):
    arrays = {"fc.weight": draw(5, 3)} | ({} if here else {"fc.bias": draw(5)})
    says = "has no 'fc.bias'; the Linear has one" if here else "has 'fc.bias'; the Linear has none"
    for load in (official.linear, lambda m, w, n: official.linears([m], w, n)):
        with pytest.raises(official.StateDictError, match=says):
            load(linear_layer(3, 5, use_bias=here), official.StateDict(arrays), "fc")
    with pytest.raises(official.StateDictError, match=says):
        official.joined_linear(linear_layer(3, 5, use_bias=here), official.StateDict(arrays), ["fc"])


def test_a_norm_without_scale_refuses_an_official_one():
    norm = RMSNorm(4, use_scale=False, rngs=nnx.Rngs(0))
    with pytest.raises(official.StateDictError, match=r"'norm.weight' has no counterpart here"):
        official.norm(norm, official.StateDict({"norm.weight": draw(4)}), "norm")


def test_shape_errors_say_both_shapes():
    weights = official.StateDict({"fc.weight": draw(5, 3), "fc.bias": draw(5)})
    with pytest.raises(official.StateDictError, match=r"'fc.weight' gives shape \(3, 5\) .* here is \(3, 6\)"):
        official.linear(linear_layer(3, 6), weights, "fc")


def test_missing_names_get_a_suggestion():
    weights = official.StateDict(block_dict())
    with pytest.raises(
        official.StateDictError, match=r"no 'blocks.0.atn.qkv.weight'; did you mean 'blocks.0.attn.qkv.w"
    ):
        official.linear(linear_layer(4, 12), weights, "blocks.0.atn.qkv")
    with pytest.raises(official.StateDictError, match=r"nothing below 'blocks.1'"):
        weights.sub("blocks.1")


def test_whole_module_loads_and_keeps_dtypes():
    block = Block(nnx.Rngs(0))
    block.token = nnx.Param(jnp.zeros((4,), jnp.bfloat16))
    load_block(block, {name: array.astype(np.float64) for name, array in block_dict().items()})
    assert block.qkv.kernel[...].dtype == jnp.float32
    assert block.token[...].dtype == jnp.bfloat16
    np.testing.assert_array_equal(block.token[...], block_dict()["cls_token"][0, 0].astype(jnp.bfloat16))


def test_official_arrays_left_over_are_listed_unless_ignored():
    arrays = block_dict() | {
        "blocks.0.attn.relative_position_index": np.arange(4),
        "bn.num_batches_tracked": np.array(3),
        "head.weight": draw(2, 4),
    }
    with pytest.raises(official.StateDictError) as error:
        load_block(Block(nnx.Rngs(0)), arrays)
    assert str(error.value) == "official arrays never loaded: blocks.0.attn.relative_position_index, head.weight"
    load_block(Block(nnx.Rngs(0)), arrays, ignore=("relative_position_index", "head.*"))


def test_parameters_here_without_a_value_are_listed_unless_kept():
    class Wider(Block):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.gain = nnx.Param(jnp.ones(()))

    with pytest.raises(official.StateDictError, match=r"^parameters here without an official value: gain$"):
        load_block(Wider(nnx.Rngs(0)), block_dict())
    load_block(Wider(nnx.Rngs(0)), block_dict(), keep=("gain",))


def test_an_error_inside_the_block_is_not_hidden_by_the_final_check():
    with pytest.raises(ZeroDivisionError), official.StateDict(block_dict()):
        raise ZeroDivisionError


def test_a_single_pattern_is_not_taken_for_a_sequence():
    with pytest.raises(TypeError, match="ignore must be a sequence of patterns, not the string 'head'"):
        official.StateDict({}, ignore="head")


def test_integers_are_not_loaded_into_floating_point():
    with pytest.raises(official.StateDictError, match="'t' is int32; the parameter here is float32"):
        official.param(nnx.Param(jnp.zeros(3)), official.StateDict({"t": np.arange(3, dtype=np.int32)}), "t")


def test_gradients_flow_to_the_official_arrays():
    x = draw(2, 4)

    def loss(arrays):
        block = Block(nnx.Rngs(0))
        load_block(block, arrays)
        return jnp.sum(jnp.sin(block.qkv(block.norm(x) + block.token[...])))

    arrays = {name: jnp.asarray(a) for name, a in block_dict().items()}
    grads = jax.jit(jax.grad(loss))(arrays)
    for name, array in arrays.items():
        direction = jnp.asarray(draw(*array.shape))
        step = 1e-2
        ahead, behind = (loss(arrays | {name: array + s * step * direction}) for s in (1, -1))
        np.testing.assert_allclose(
            jnp.vdot(grads[name], direction), (ahead - behind) / (2 * step), rtol=2e-2, atol=1e-2
        )
