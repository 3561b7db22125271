"""Golden adapter of `retrieval_heads`."""

from attnlab.interop.official import runner
from attnlab.interop.retrieval_heads import OFFICIAL

run = runner(OFFICIAL)
