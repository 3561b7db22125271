"""Golden adapter of `cat_curvature`."""

from attnlab.interop.cat_curvature import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
