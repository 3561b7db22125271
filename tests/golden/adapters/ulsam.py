"""Golden adapter of `ulsam`."""

from attnlab.interop.ulsam import OFFICIAL

from attnlab.interop.official import runner

run = runner(OFFICIAL)
