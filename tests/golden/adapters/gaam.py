"""Golden adapter of `gaam`."""

from attnlab.interop.gaam import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
