"""Trained language models made into others with most of their weights: what `attnlab convert` runs.

runner.py       the same for every target: quality before and after, fine-tuning, the run that is written
carry_over.py   weights of one model in another that shares most of them
to_NAME.py      one target each: what the new mixer is, and how it comes to do what the old one did
"""
