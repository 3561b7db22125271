"""Golden adapter of `maxvit`."""

from attnlab.interop.maxvit import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
