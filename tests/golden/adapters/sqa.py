"""Golden adapter of `sqa`."""

from attnlab.interop.official import runner
from attnlab.interop.sqa import OFFICIAL

run = runner(OFFICIAL)
