"""Settings of the whole suite: one thread, because tiny models lose more to waking threads than they gain."""

from __future__ import annotations

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
