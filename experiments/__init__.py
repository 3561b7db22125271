"""Runnable configurations.

A configuration is a file with `CONFIG`, an `attnlab.experiment.Experiment`; `attnlab train NAME` trains the one of that
name, and takes any setting of it as an option. Its docstring states the command, the hardware, the time and the number
to expect.
"""
