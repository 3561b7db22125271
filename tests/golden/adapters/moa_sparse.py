"""Golden adapter of `moa_sparse`."""

from attnlab.interop.moa_sparse import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
