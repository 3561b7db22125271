"""Golden adapter of `rala`."""

from attnlab.interop.official import runner
from attnlab.interop.rala import OFFICIAL

run = runner(OFFICIAL)
