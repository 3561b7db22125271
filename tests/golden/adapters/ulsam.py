"""Golden adapter of `ulsam`."""

from attnlab.interop.official import runner
from attnlab.interop.ulsam import OFFICIAL

run = runner(OFFICIAL)
