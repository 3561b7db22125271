"""Golden adapter of `tap_adl`."""

from attnlab.interop.official import runner
from attnlab.interop.tap_adl import OFFICIAL

run = runner(OFFICIAL)
