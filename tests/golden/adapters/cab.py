from attnlab.interop.cab import OFFICIAL
from attnlab.interop.official import runner

_run = runner(OFFICIAL)


def run(meta, param, inputs):
    """Keys that were drawn at random stand among the parameters, and are an input of the call."""
    drawn = {name: param[name] for name in ("index_sample",) if name in param}
    return _run(meta, param, inputs | drawn)
