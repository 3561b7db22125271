"""Golden adapter of `var`."""

from attnlab.interop.official import runner
from attnlab.interop.var import OFFICIAL

run = runner(OFFICIAL)
