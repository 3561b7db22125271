"""Golden adapter of `kronecker_attention`."""

from attnlab.interop.kronecker_attention import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
