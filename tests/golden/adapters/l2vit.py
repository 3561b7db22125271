"""Golden adapter of `l2vit`."""

from attnlab.interop.l2vit import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
