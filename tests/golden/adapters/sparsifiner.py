"""Golden adapter of `sparsifiner`."""

from attnlab.interop.official import runner
from attnlab.interop.sparsifiner import OFFICIAL

run = runner(OFFICIAL)
