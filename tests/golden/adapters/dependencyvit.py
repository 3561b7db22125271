"""Golden adapter of `dependencyvit`."""

from attnlab.interop.dependencyvit import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
