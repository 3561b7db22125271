from attnlab.interop.neighborhood_attention import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
