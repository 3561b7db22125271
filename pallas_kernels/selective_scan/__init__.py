"""The selective scan of Mamba (S6), in linear time and memory. See `api` for the contract."""

from pallas_kernels.selective_scan.api import explain, init_state, selective_scan, selective_scan_step

__all__ = ["explain", "init_state", "selective_scan", "selective_scan_step"]
