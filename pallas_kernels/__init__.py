"""Attention kernels for JAX: pure functions on arrays, one signature for every platform.

`linear_attention`, `delta_rule_attention`, `selective_scan`, `block_sparse_attention` and `neighborhood_attention` are
the functions; their packages are `from pallas_kernels.linear_attention import ...`, and so on. Importing this package
needs JAX and NumPy alone. `dispatch.explain` tells which implementations work on a machine and why others do not;
`qualify` tries the kernels on the device at hand, and without it only `xla` is chosen there.
"""

from pallas_kernels import dispatch
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.delta_rule_attention import delta_rule_attention, delta_rule_attention_step
from pallas_kernels.linear_attention import NormalizedState, init_state, linear_attention, linear_attention_step
from pallas_kernels.neighborhood_attention import neighborhood_attention
from pallas_kernels.selective_scan import selective_scan, selective_scan_step
from pallas_kernels.trials import qualify, qualify_new_device

__all__ = [
    "NormalizedState",
    "block_sparse_attention",
    "delta_rule_attention",
    "delta_rule_attention_step",
    "dispatch",
    "init_state",
    "linear_attention",
    "linear_attention_step",
    "neighborhood_attention",
    "qualify",
    "qualify_new_device",
    "selective_scan",
    "selective_scan_step",
]
