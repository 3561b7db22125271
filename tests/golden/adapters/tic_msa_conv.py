"""Golden adapter of `tic_msa_conv`."""

from attnlab.interop.official import runner
from attnlab.interop.tic_msa_conv import OFFICIAL

run = runner(OFFICIAL)
