"""Golden adapter of `catanet`."""

from attnlab.interop.catanet import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
