"""Golden adapter of `task_decoupled_masking`."""

from attnlab.interop.official import runner
from attnlab.interop.task_decoupled_masking import OFFICIAL

run = runner(OFFICIAL)
