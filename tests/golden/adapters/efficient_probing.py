from attnlab.interop.efficient_probing import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
