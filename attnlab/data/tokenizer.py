"""Bytes as tokens: ids 0 to 255 are the bytes themselves, and two special tokens follow.

END_OF_TEXT   closes every document, so that a model learns where texts end (and `generate` can stop there)
PAD           fills the rest of the last window of a split; its weight in the loss is 0
"""

from collections.abc import Iterable

import numpy as np

END_OF_TEXT = 256
PAD = 257
VOCAB_SIZE = 258


def encode(text: str | bytes) -> np.ndarray:
    """Token ids of a text, int32 (N,); a `str` is encoded as UTF-8. No special token is added."""
    data = text.encode() if isinstance(text, str) else bytes(text)
    return np.frombuffer(data, np.uint8).astype(np.int32)


def decode(ids: Iterable[int] | np.ndarray) -> bytes:
    """The bytes of token ids (N,), without the special tokens.

    A model may stop within a character: `decode(ids).decode(errors="replace")` shows such a text.

    Raises:
      ValueError: if an id is not a token.
    """
    array = np.asarray(ids if isinstance(ids, np.ndarray) else list(ids))
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"ids must be integers of shape (N,), not {array.dtype} {array.shape}")
    if array.size and (array.min() < 0 or array.max() >= VOCAB_SIZE):
        raise ValueError(f"ids must lie in 0..{VOCAB_SIZE - 1}, not {array.min()}..{array.max()}")
    return array[array < END_OF_TEXT].astype(np.uint8).tobytes()
