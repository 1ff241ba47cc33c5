"""Settings of the whole suite: one thread, because tiny models lose more to waking threads than they gain; Ctrl-C as in
a terminal, because a job that runs in the background starts with it ignored; and, where there is no GPU, Triton's
interpreter, which must be asked for before any kernel is imported."""

from __future__ import annotations

import os
import signal

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)
