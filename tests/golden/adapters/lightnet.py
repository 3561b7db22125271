"""Golden adapter of `lightnet`."""

from attnlab.interop.lightnet import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
