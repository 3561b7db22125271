from attnlab.interop.lightning_attention_2 import OFFICIAL
from attnlab.interop.official import runner

run = runner(OFFICIAL)
