"""Golden adapter of `core_context_attention`."""

from attnlab.interop.core_context_attention import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
