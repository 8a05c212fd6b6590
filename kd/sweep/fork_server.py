"""Imported by the process from which workers are forked, and by no other.

That process imports the training code once, so that a worker starts at once and shares its memory.
It has a session of its own: a signal to the process group of the sweep, such as Ctrl-C or the
SIGHUP of a closed terminal, is for the parent process to handle. The server exits when the parent
does.
"""

import os
import signal

os.setsid()
for _number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(_number, signal.SIG_IGN)

# The optimizers and the shapes of networks need this; it takes as long to import as torch itself
import torch._dynamo  # noqa: E402, F401

import kd.training.run  # noqa: E402, F401
