"""Golden adapter of `phantom`."""

from attnlab.interop.official import runner
from attnlab.interop.phantom import OFFICIAL

run = runner(OFFICIAL)
