"""Golden adapter of `bert4rec`."""

from attnlab.interop.bert4rec import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
