"""Golden adapter of `mla`."""

from attnlab.interop.mla import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
