"""Kernels against their peers and against the machine, and mixers against each other: what `attnlab bench` runs.

problem.py       what is timed: an op at one shape, dtype and decay, and the least bytes and operations that it needs
gate.py          a result is compared with float64 before its time counts
timing.py        seconds of a call; bandwidth and rate of this machine, measured in the same run
contenders.py    our implementations, and JAX's softmax attention
torch_peers.py   peers that need PyTorch, in a process of their own
runner.py        gates and times every contender at every problem
report.py        the table, results.json, and tokens per second against length
mixers.py        registered mixers: gate and times
mixer_report.py  their table, and time against length
cpu.py           on a CPU, attention and models against PyTorch and timm; cpu_torch.py is their process
"""
