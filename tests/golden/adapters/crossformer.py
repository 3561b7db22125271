"""Golden adapter of `crossformer`."""

from attnlab.interop.crossformer import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
