"""Golden adapter of `secondary_sinks`."""

from attnlab.interop.official import runner
from attnlab.interop.secondary_sinks import OFFICIAL

run = runner(OFFICIAL)
