from attnlab.interop.agent_attention import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
