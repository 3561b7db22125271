"""The selective scan on GPUs through jax-triton: a program for each block of channels walks over chunks of tokens."""
