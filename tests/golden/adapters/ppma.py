"""Golden adapter of `ppma`."""

from attnlab.interop.official import runner
from attnlab.interop.ppma import OFFICIAL

run = runner(OFFICIAL)
