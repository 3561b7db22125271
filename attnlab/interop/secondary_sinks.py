"""Secondary sinks of JeffreyWong20/Secondary-Attention-Sinks, of one sequence at a time."""

from typing import Any

import jax
import jax.numpy as jnp

from attnlab.analysis.secondary_sinks import detect_sinks
from attnlab.analysis.spectra import matrix_entropy
from attnlab.interop.official import Given, Inputs, Official, options


def _detect(detect: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    found = detect(inputs["hidden"][None])
    return {
        "member": found.member[0].astype(jnp.int32),
        "type": found.type[0],
        "has_secondary": found.has_secondary[0].astype(jnp.int32),
    }


def _entropy(entropy: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    # The official function divides by the sum over the batch, of which there is one.
    x = inputs["x"]
    return {
        "S_alpha1": entropy(x).entropy,
        "S_alpha2": entropy(x, alpha=2.0).entropy,
        "eigs": entropy(x).eigenvalues,
    }


OFFICIAL = [
    Official(
        "detect",
        detect_sinks,
        options(
            "clip", cos_threshold="threshold", bos_sink_pos=lambda given: {"candidates": tuple(given["bos_sink_pos"])}
        ),
        call=_detect,
    ),
    Official("compute_matrix_based_entropy", matrix_entropy, call=_entropy),
]
