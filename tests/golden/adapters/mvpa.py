"""Golden adapter of `mvpa`."""

from attnlab.interop.mvpa import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
