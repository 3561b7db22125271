"""Golden adapter of `halonet`."""

from attnlab.interop.halonet import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
