"""Golden adapter of `landmark_attention`."""

from attnlab.interop.landmark_attention import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
