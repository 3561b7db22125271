"""Golden adapter of `tanet`."""

from attnlab.interop.official import runner
from attnlab.interop.tanet import OFFICIAL

run = runner(OFFICIAL)
