"""When it pays, on a GPU that the heads do not fill, to cut the sequence.

A causal cut costs two more steps, one after the other: a light sweep for each split's own state, and a scan over these.
"""

OVERHEAD = 16  # chunks that a sweep takes in the time of the two more launches, some 20 microseconds
LIGHT = 0.5  # of the time of a sweep, what one takes that writes no outputs


def pays(chunks: int, splits: int) -> bool:
    """Whether a sequence of so many chunks is done sooner in splits than in one sweep."""
    return (1 + LIGHT) * chunks / splits + OVERHEAD < chunks
