"""Golden adapter of `active_dormant`."""

from attnlab.interop.active_dormant import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
