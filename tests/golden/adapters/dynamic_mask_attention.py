"""Golden adapter of `dynamic_mask_attention`."""

from attnlab.interop.dynamic_mask_attention import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
