"""A user of aer_fast: a PPO trainer for causal language models of transformers."""

import signal
import sys
from multiprocessing.spawn import is_forking

if is_forking(sys.argv):  # a process that a run has started: Ctrl-C is for the run
    signal.signal(signal.SIGINT, signal.SIG_IGN)
elif sys.argv[0] == "-m":  # a command that is still importing: end, with no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
