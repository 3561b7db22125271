"""Golden adapter of `urpe`."""

from attnlab.interop.official import runner
from attnlab.interop.urpe import OFFICIAL

run = runner(OFFICIAL)
