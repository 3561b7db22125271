"""Causal attention by the (gated) delta rule, in linear time and memory. See `api` for the contract."""

from pallas_kernels.delta_rule_attention.api import (
    delta_rule_attention,
    delta_rule_attention_step,
    explain,
    init_state,
)

__all__ = ["delta_rule_attention", "delta_rule_attention_step", "explain", "init_state"]
