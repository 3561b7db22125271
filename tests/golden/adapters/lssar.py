"""Golden adapter of `lssar`."""

from attnlab.interop.lssar import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
