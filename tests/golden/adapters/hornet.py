"""Golden adapter of `hornet`."""

from attnlab.interop.hornet import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
