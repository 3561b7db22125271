"""Golden adapter of `soft`."""

from attnlab.interop.official import runner
from attnlab.interop.soft import OFFICIAL

run = runner(OFFICIAL)
