"""Golden adapter of `a2mamba`."""

from attnlab.interop.a2mamba import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
