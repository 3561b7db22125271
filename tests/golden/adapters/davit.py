"""Golden adapter of `davit`."""

from attnlab.interop.davit import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
