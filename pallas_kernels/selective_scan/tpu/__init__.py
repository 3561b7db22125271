"""The TPU kernels of the selective scan."""
