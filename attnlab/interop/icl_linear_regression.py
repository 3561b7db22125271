"""In-context linear regression of XintianPan/ICL_linear: the layer, and the formulas of the theory."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.analysis import icl_linear_regression as theory
from attnlab.interop.official import Given, Inputs, Official, options
from attnlab.models.in_context_regression import InContextAttention


def _formulas(**setting: Any) -> Mapping[str, Any]:
    """The arguments of the theory, which has no parameters."""
    return setting


def _theory(formulas: Any, inputs: Inputs, given: Given) -> dict[str, jax.Array]:
    setting = {"d": given["d"], "length": given["L"], "variance": given["var"]}
    data = (inputs["X"], inputs["y"], inputs["xq"])
    found: dict[str, Any] = {}
    for index in sorted(name.removeprefix("omega") for name in inputs if name.startswith("omega")):
        omega, mu = inputs[f"omega{index}"], inputs[f"mu{index}"]
        found[f"mu_star{index}"] = theory.optimal_mu(omega, **setting)
        found[f"approx_loss{index}"] = theory.approximate_loss(omega, mu, **setting)
        found[f"grad_mu{index}"], found[f"grad_omega{index}"] = theory.flow_gradients(omega, mu, **setting)
        found[f"est{index}"] = theory.predict_by_heads(*data, omega=omega, mu=mu)
    step = {"omega": given["gd_omega"], "mu": given["gd_mu"]}
    found["gd_est"] = theory.predict_by_descent(*data, **step)
    found["dgd_est"] = theory.predict_by_descent(*data, **step, debiased=True)
    found["ridge_est"] = theory.predict_by_ridge(*data, variance=given["var"])
    found["ridge_limit_loss"] = theory.ridge_risk(given["d"] / given["L"], given["var"])
    flow, start = given["flow"], {name: given["flow"][f"{name}0"] for name in ("omega", "mu")}
    run = theory.gradient_flow(**start, **setting, rate=flow["lr"], steps=flow["steps"], every=flow["every"])
    found |= {"flow_mu": run.mu, "flow_omega": run.omega, "flow_loss": run.loss}
    return {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}


OFFICIAL = [
    Official(
        "MultiHeadAttention",
        InContextAttention,
        options(n_embd="features", n_head="num_heads", n_out="out_features", bias="use_bias", init_method="init"),
        {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"},
    ),
    Official("theory", _formulas, call=_theory),
]
