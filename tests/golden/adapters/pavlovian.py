"""Golden adapter of `pavlovian`."""

from attnlab.interop.official import runner
from attnlab.interop.pavlovian import OFFICIAL

run = runner(OFFICIAL)
