"""Golden adapter of `hedgehog`."""

from flax import nnx

from attnlab.attention.linear.hedgehog import HedgehogFeatureMap
from attnlab.interop.linear_attention import load_hedgehog_feature_map
from attnlab.interop.official import StateDict
from attnlab.nn.linear_mixer import linear_attention_map
from attnlab.objectives.attention_distillation import attention_distillation
from pallas_kernels.linear_attention import linear_attention


def run(meta, param, inputs):
    return CLASSES[meta["class"]](meta["config"], param, inputs)


def lolcats(config, param, inputs):
    tied = not any(name.startswith("feature_map_k") for name in param)
    mapping = {
        "feature_dim": config["feature_dim"],
        "activation": config["feature_map"],
        "full_space": config["fullspace"],
        "skip_connection": config["skip_connection"],
        "use_bias": config["bias"],
        "eps": config["eps"],
    }
    maps = features(config["num_heads"], config["head_dim"], mapping, tied, param)
    q, k = maps[0](inputs["q"]), maps[1](inputs["k"])
    options = {"causal": config["causal"], "normalize": True}
    y = linear_attention(q, k, inputs["v"], **options)
    return {"y": y, "attn": linear_attention_map(q, k, **options), "phi_q": q, "phi_k": k}


def fla(config, param, inputs):
    mapping = {"activation": "softmax_joint", "shared": True, "use_bias": True}
    maps = features(inputs["q"].shape[2], config["head_dim"], mapping, False, param)
    q, k = maps[0](inputs["q"]), maps[1](inputs["k"])
    scale = maps[0].out_features ** -0.5
    y = linear_attention(q, k, inputs["v"], scale=scale, normalize=config["normalize"])
    return {"y": y, "phi_q": q}


def features(num_heads, head_dim, mapping, tied, param):
    """The feature maps of queries and keys."""
    of_q = HedgehogFeatureMap(num_heads, head_dim, **mapping, rngs=nnx.Rngs(0))
    of_k = of_q if tied else HedgehogFeatureMap(num_heads, head_dim, **mapping, rngs=nnx.Rngs(0))
    with StateDict(param) as weights:
        load_hedgehog_feature_map(of_q, weights.sub("feature_map_q"))
        if not tied:
            load_hedgehog_feature_map(of_k, weights.sub("feature_map_k"))
    return of_q, of_k


def distillation(config, param, inputs):
    layers = range(config["layers"])
    parts = ([inputs[f"{kind}{layer}"] for layer in layers] for kind in ("attn_pred", "attn_true", "y_pred", "y_true"))
    loss = attention_distillation(*parts, xent_factor=config["xent_factor"], mse_factor=config["mse_factor"])
    return {"loss": loss[None]}


CLASSES = {
    "FeatureMap(FeatureMapMLP)+quadratic_attention": lolcats,
    "HedgehogFeatureMap+naive_chunk_linear_attn": fla,
    "OurTrainer.compute_loss": distillation,
}
