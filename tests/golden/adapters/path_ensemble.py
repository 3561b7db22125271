"""Golden adapter of `path_ensemble`."""

from attnlab.interop.official import runner
from attnlab.interop.path_ensemble import OFFICIAL

run = runner(OFFICIAL)
