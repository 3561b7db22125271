"""Golden adapter of `vmoba`."""

from attnlab.interop.official import runner
from attnlab.interop.vmoba import OFFICIAL

run = runner(OFFICIAL)
