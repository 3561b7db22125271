"""Golden adapter of `overlock`."""

from attnlab.interop.overlock import OFFICIAL

from attnlab.interop.official import runner

run = runner(OFFICIAL)
