"""Golden adapter of `act_calibration`."""

from attnlab.interop.act_calibration import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
