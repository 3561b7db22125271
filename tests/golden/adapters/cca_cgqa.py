"""Golden adapter of `cca_cgqa`."""

from attnlab.interop.cca_cgqa import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
