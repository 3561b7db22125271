"""Golden adapter of `spectformer`."""

from attnlab.interop.official import runner
from attnlab.interop.spectformer import OFFICIAL

run = runner(OFFICIAL)
