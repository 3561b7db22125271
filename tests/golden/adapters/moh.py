"""Golden adapter of `moh`."""

from attnlab.interop.moh import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
