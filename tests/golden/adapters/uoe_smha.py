"""Golden adapter of `uoe_smha`."""

from attnlab.interop.official import runner
from attnlab.interop.uoe_smha import OFFICIAL

run = runner(OFFICIAL)
