"""Golden adapter of `rectified_spaattn`."""

from attnlab.interop.official import runner
from attnlab.interop.rectified_spaattn import OFFICIAL

run = runner(OFFICIAL)
