"""Golden adapter of `acmil`."""

from attnlab.interop.acmil import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
