from attnlab.interop.hedgehog import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
