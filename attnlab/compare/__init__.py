"""The same model, data and seed under several mixers: trained, measured, and written up.

runner.py    trains every mixer in a directory of its own, and goes on from what is there
measure.py   parameters, memory of a step, time against length, attention maps
size.py      the width at which models are equally large
noise.py     several seeds: intervals, and which differences are noise
results.py   what is known of each mixer in the end: `results.json`
plots.py     the figures, light and dark
report.py    one HTML page that needs no other file
"""
