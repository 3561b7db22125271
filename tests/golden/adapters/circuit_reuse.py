"""Golden adapter of `circuit_reuse`."""

from attnlab.interop.circuit_reuse import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
