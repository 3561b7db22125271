"""Golden adapter of `mhs_vm`."""

from attnlab.interop.mhs_vm import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
