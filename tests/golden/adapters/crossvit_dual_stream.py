"""Golden adapter of `crossvit_dual_stream`."""

from attnlab.interop.crossvit_dual_stream import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
