"""Golden adapter of `dyn_perceiver`."""

from attnlab.interop.dyn_perceiver import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
