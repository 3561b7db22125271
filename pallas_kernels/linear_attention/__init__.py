"""Linear attention, causal with decay or non-causal, in linear time and memory. See `api` for the contract."""

from pallas_kernels.linear_attention.api import explain, init_state, linear_attention, linear_attention_step
from pallas_kernels.recurrence import NormalizedState

__all__ = ["NormalizedState", "explain", "init_state", "linear_attention", "linear_attention_step"]
