"""Golden adapter of `icl_linear_regression`."""

from attnlab.interop.icl_linear_regression import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
