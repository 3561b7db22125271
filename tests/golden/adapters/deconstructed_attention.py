"""Golden adapter of `deconstructed_attention`."""

from attnlab.interop.deconstructed_attention import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
