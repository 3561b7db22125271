"""Golden adapter of `pine`."""

from attnlab.interop.official import runner
from attnlab.interop.pine import OFFICIAL

run = runner(OFFICIAL)
