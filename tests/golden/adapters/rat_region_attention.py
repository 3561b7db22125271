"""Golden adapter of `rat_region_attention`."""

from attnlab.interop.official import runner
from attnlab.interop.rat_region_attention import OFFICIAL

run = runner(OFFICIAL)
