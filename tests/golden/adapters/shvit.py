"""Golden adapter of `shvit`."""

from attnlab.interop.official import runner
from attnlab.interop.shvit import OFFICIAL

run = runner(OFFICIAL)
