"""GPT-2 and LLaMA in their published layouts, against the models written out in NumPy."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from attnlab import interop
from attnlab.interop.gpt2 import OFFICIAL as GPT2S
from attnlab.interop.llama import OFFICIAL as LLAMAS
from attnlab.interop.official import ConfigError, choose
from attnlab.models.gpt2 import GPT2
from attnlab.models.gpt2 import SIZES as GPT2_SIZES
from attnlab.models.llama import SIZES as LLAMA_SIZES
from attnlab.models.llama import Llama

IDS = np.random.default_rng(0).integers(0, 11, (2, 7))
GPT2_CONFIG = {"vocab_size": 11, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 9, "n_inner": None}
GPT2_CONFIG |= {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "resid_pdrop": 0.1}
LLAMA_CONFIG = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA_CONFIG |= {"num_key_value_heads": 2, "intermediate_size": 13, "rms_norm_eps": 1e-5, "rope_theta": 100.0}


def logits(model):
    graph, state = nnx.split(model)
    return jax.jit(lambda state: nnx.merge(graph, state)(IDS))(state)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def attention(q, k, v):
    """Causal, on (B, N, H, D) with G key heads."""
    k, v = (np.repeat(part, q.shape[2] // part.shape[2], axis=2) for part in (k, v))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(q.shape[1], dtype=bool), scores, -np.inf)
    return np.einsum("bhnm,bmhe->bnhe", softmax(scores), v).reshape(*q.shape[:2], -1)


def gpt2_weights(random):
    def draw(*shape):
        return random.standard_normal(shape) * 0.5

    w = {"wte.weight": draw(11, 8), "wpe.weight": draw(9, 8), "ln_f.weight": draw(8), "ln_f.bias": draw(8)}
    for layer in range(2):
        for part, shape in (("ln_1", (8,)), ("ln_2", (8,)), ("attn.c_attn", (8, 24)), ("attn.c_proj", (8, 8))):
            w |= {f"h.{layer}.{part}.weight": draw(*shape), f"h.{layer}.{part}.bias": draw(shape[-1])}
        for part, shape in (("mlp.c_fc", (8, 32)), ("mlp.c_proj", (32, 8))):
            w |= {f"h.{layer}.{part}.weight": draw(*shape), f"h.{layer}.{part}.bias": draw(shape[-1])}
    return w


def gpt2_logits(w):
    def affine(x, name):
        return x @ w[f"{name}.weight"] + w[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["wte.weight"][IDS] + w["wpe.weight"][: IDS.shape[1]]
    for h in ("h.0", "h.1"):
        q, k, v = (p.reshape(2, 7, 2, 4) for p in np.split(affine(norm(x, f"{h}.ln_1"), f"{h}.attn.c_attn"), 3, -1))
        x = x + affine(attention(q, k, v), f"{h}.attn.c_proj")
        y = affine(norm(x, f"{h}.ln_2"), f"{h}.mlp.c_fc")
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + affine(y, f"{h}.mlp.c_proj")
    return norm(x, "ln_f") @ w["wte.weight"].T


def llama_weights(random):
    def draw(*shape):
        return random.standard_normal(shape) * 0.5

    w = {"model.embed_tokens.weight": draw(11, 8), "model.norm.weight": draw(8), "lm_head.weight": draw(11, 8)}
    for layer in range(2):
        at = f"model.layers.{layer}"
        w |= {f"{at}.{norm}.weight": draw(8) for norm in ("input_layernorm", "post_attention_layernorm")}
        rows = {"q": 8, "k": 4, "v": 4, "o": 8}
        w |= {f"{at}.self_attn.{part}_proj.weight": draw(count, 8) for part, count in rows.items()}
        w |= {f"{at}.mlp.{part}_proj.weight": draw(13, 8) for part in ("gate", "up")}
        w[f"{at}.mlp.down_proj.weight"] = draw(8, 13)
    return w


def llama_logits(w):
    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[name]

    def rotate(x):
        angles = np.arange(7)[:, None, None] * 100.0 ** -(np.arange(1) / 1)
        first, second = x[..., :1], x[..., 1:]
        return np.concatenate(
            [first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)], -1
        )

    x = w["model.embed_tokens.weight"][IDS]
    for layer in range(2):
        at = f"model.layers.{layer}"
        y = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = ((y @ w[f"{at}.self_attn.{p}_proj.weight"].T).reshape(2, 7, -1, 2) for p in "qkv")
        x = x + attention(rotate(q), rotate(k), v) @ w[f"{at}.self_attn.o_proj.weight"].T
        y = norm(x, f"{at}.post_attention_layernorm.weight")
        gate, up = (y @ w[f"{at}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}.mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


def test_gpt2_from_a_published_file_and_back(tmp_path):
    weights = gpt2_weights(np.random.default_rng(1))
    # As it is published: without a prefix, with the causal masks.
    file = {name: array.astype(np.float32) for name, array in weights.items()}
    file |= {f"h.{layer}.attn.bias": np.tri(9, dtype=np.float32)[None, None] for layer in range(2)}
    safetensors.numpy.save_file(file, tmp_path / "model.safetensors")
    official = choose(GPT2S, "GPT2Model", GPT2_CONFIG, file)
    model = official.build(GPT2_CONFIG)
    interop.load(model, tmp_path / "model.safetensors")
    np.testing.assert_allclose(logits(model), gpt2_logits(weights), rtol=1e-4, atol=1e-4)
    interop.export(model, tmp_path / "out.safetensors", symbol="GPT2LMHeadModel")
    out = safetensors.numpy.load_file(tmp_path / "out.safetensors")
    assert {f"transformer.{name}" for name in weights} == out.keys()
    np.testing.assert_array_equal(out["transformer.h.1.attn.c_attn.weight"], file["h.1.attn.c_attn.weight"])


def test_llama_from_a_published_file_and_from_metas(tmp_path):
    weights = llama_weights(np.random.default_rng(2))
    file = {name: array.astype(np.float32) for name, array in weights.items()}
    safetensors.numpy.save_file(file, tmp_path / "model.safetensors")
    model = choose(LLAMAS, "LlamaForCausalLM", LLAMA_CONFIG, file).build(LLAMA_CONFIG)
    interop.load(model, tmp_path / "model.safetensors")
    want = llama_logits(weights)
    np.testing.assert_allclose(logits(model), want, rtol=1e-4, atol=1e-4)

    # Meta's rows of queries and keys stand in pairs; with heads of two channels these are the same.
    meta = {"dim": 8, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 11, "multiple_of": 13}
    meta |= {"norm_eps": 1e-5, "rope_theta": 100.0, "ffn_dim_multiplier": 0.5}
    theirs = choose(LLAMAS, "Transformer", meta, ())
    other = theirs.build(meta)
    places = {"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm", "self_attn": "attention"}
    places |= {f"{p}_proj": f"w{p}" for p in "qkvo"} | {"mlp": "feed_forward", "gate_proj": "w1", "up_proj": "w3"}
    places |= {"down_proj": "w2", "embed_tokens": "tok_embeddings", "lm_head": "output", "model": ""}
    renamed = {".".join(filter(None, (places.get(s, s) for s in n.split(".")))): a for n, a in file.items()}
    theirs.load(other, renamed)
    np.testing.assert_allclose(logits(other), want, rtol=1e-4, atol=1e-4)


def test_options_that_would_change_numbers_are_refused():
    with pytest.raises(ConfigError, match="rope_scaling must be None"):
        choose(LLAMAS, "LlamaForCausalLM", {}, ()).build({"rope_scaling": {"rope_type": "yarn", "factor": 4}})
    with pytest.raises(ConfigError, match="hidden_act must be 'silu'"):
        choose(LLAMAS, "LlamaForCausalLM", {}, ()).build({"hidden_act": "gelu"})


def test_published_sizes_have_the_published_numbers_of_parameters():
    def count(build):
        params = nnx.state(nnx.eval_shape(build), nnx.Param)
        return sum(leaf.size for leaf in jax.tree.leaves(params))

    assert count(lambda: GPT2(**GPT2_SIZES["gpt2"], rngs=nnx.Rngs(0))) == 124_439_808
    assert count(lambda: Llama(**LLAMA_SIZES["llama-3-8b"], rngs=nnx.Rngs(0))) == 8_030_261_248
