"""Attention kernels for JAX: pure functions on arrays, one signature for every platform.

`linear_attention` is the function; its package is `from pallas_kernels.linear_attention import ...`. Importing this
package needs JAX and NumPy alone. `dispatch.explain` tells which implementations work on a machine and why others
do not.
"""

from pallas_kernels import dispatch
from pallas_kernels.linear_attention import NormalizedState, init_state, linear_attention, linear_attention_step

__all__ = ["NormalizedState", "dispatch", "init_state", "linear_attention", "linear_attention_step"]
