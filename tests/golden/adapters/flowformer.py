"""Golden adapter of `flowformer`."""

from attnlab.interop.flowformer import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
