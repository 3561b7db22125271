"""Golden adapter of `raptor`."""

from attnlab.interop.official import runner
from attnlab.interop.raptor import OFFICIAL

run = runner(OFFICIAL)
