from attnlab.interop.official import runner
from attnlab.interop.tnl import OFFICIAL

run = runner(OFFICIAL)
