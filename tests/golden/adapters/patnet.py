"""Golden adapter of `patnet`."""

from attnlab.interop.official import runner
from attnlab.interop.patnet import OFFICIAL

run = runner(OFFICIAL)
