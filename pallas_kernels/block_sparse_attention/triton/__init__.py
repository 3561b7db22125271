"""Block-sparse attention on GPUs through jax-triton: a program for each block of queries, or of keys, and its list."""
