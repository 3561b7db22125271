from attnlab.interop.biformer_bra import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
