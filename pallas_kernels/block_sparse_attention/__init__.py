"""Softmax attention over the blocks of keys that a mask allows, on every platform. See `api` for the contract."""

from pallas_kernels.block_sparse_attention.api import attention_weights, block_sparse_attention, explain
from pallas_kernels.block_sparse_attention.arguments import Indexed, ScoreMod
from pallas_kernels.block_sparse_attention.blocks import Blocks
from pallas_kernels.block_sparse_attention.context_parallel import context_parallel_attention, zigzag
from pallas_kernels.block_sparse_attention.paged import paged_attention
from pallas_kernels.block_sparse_attention.parts import (
    attention_columns,
    key_group_lse,
    merge_attention,
    transposed_attention,
)

__all__ = [
    "Blocks",
    "Indexed",
    "ScoreMod",
    "attention_columns",
    "attention_weights",
    "block_sparse_attention",
    "context_parallel_attention",
    "explain",
    "key_group_lse",
    "merge_attention",
    "paged_attention",
    "transposed_attention",
    "zigzag",
]
