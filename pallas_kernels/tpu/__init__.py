"""What the TPU kernels of several ops share: chips, plans, calls, and heads side by side in lanes."""
