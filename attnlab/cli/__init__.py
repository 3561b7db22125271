"""The command line: `attnlab COMMAND`, one file for each command.

`main` looks a command up and imports only its file, so that `attnlab --help` needs no JAX and `attnlab list` no
training. A command's file has a function `run(arguments)` that returns the exit code.
"""
