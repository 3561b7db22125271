"""Golden adapter of `overlock`."""

from attnlab.interop.official import runner
from attnlab.interop.overlock import OFFICIAL

run = runner(OFFICIAL)
