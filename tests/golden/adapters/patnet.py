"""Golden adapter of `patnet`."""

from attnlab.interop.patnet import OFFICIAL

from attnlab.interop.official import runner

run = runner(OFFICIAL)
