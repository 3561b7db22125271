"""Golden adapter of `raptor`."""

from attnlab.interop.raptor import OFFICIAL

from attnlab.interop.official import runner

run = runner(OFFICIAL)
