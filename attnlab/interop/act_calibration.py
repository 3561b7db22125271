"""Attention calibration of GATECH-EIC/ACT, which has no weights."""

from attnlab.interop.official import Official, Only
from attnlab.interventions.act_calibration import calibrate_sinks

OFFICIAL = [
    Official(
        "atten_process_eval",
        calibrate_sinks,
        {"threshold": "theta", "causal": Only(True), "heads": lambda given: {"heads": tuple(given["heads"])}},
        call=lambda calibrate, inputs, given: {"attn": calibrate(inputs["attn"])},
    )
]
