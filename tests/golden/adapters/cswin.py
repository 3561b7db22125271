"""Golden adapter of `cswin`."""

from attnlab.interop.cswin import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
