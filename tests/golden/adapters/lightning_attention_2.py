"""Golden adapter of `lightning_attention_2`."""

import jax.numpy as jnp
from flax import nnx

from attnlab.attention.linear.lightning_attention_2 import LightningAttention, lightning_attention
from attnlab.interop.linear_attention import load_lightning_attention
from attnlab.interop.official import StateDict
from attnlab.nn.positions import alibi_slopes

HEADS = range(1, 129)


def run(meta, param, inputs):
    if meta["class"] == "_build_slope_tensor":
        return {f"slopes_h{heads}": alibi_slopes(heads) for heads in HEADS}
    if meta["class"] == "linear_attn":
        return {"y": lightning_attention(inputs["q"], inputs["k"], inputs["v"], inputs.get("s"))}
    if meta["class"] != "MiniMaxLightningAttention":
        raise NotImplementedError(meta["class"])
    config = meta["config"]
    module = LightningAttention(
        config["hidden_size"],
        num_heads=config["num_attention_heads"],
        head_dim=config["head_dim"],
        layer=config["layer_idx"],
        num_layers=config["num_hidden_layers"],
        eps=config["norm_eps"],
        rngs=nnx.Rngs(0),
    )
    with StateDict(param, into=module, ignore=("slope_rate",)) as weights:
        load_lightning_attention(module, weights)
    x, mask = inputs["x"], inputs.get("attention_mask")
    mask = None if mask is None else mask > 0
    _, state = module.prefill(x, module.init_state(x.shape[0]), mask=mask)
    return {"y": module(x, mask=mask), "kv_state": state.memory, "y_decode": decode(module, x, tokens=5)}


def decode(module, x, tokens):
    """All but the last tokens in one run, the last one by one."""
    start = x.shape[1] - tokens
    run, state = module.prefill(x[:, :start], module.init_state(x.shape[0]))
    rows = [run]
    for i in range(start, x.shape[1]):
        y, state = module.step(x[:, i], state)
        rows.append(y[:, None])
    return jnp.concatenate(rows, axis=1)
