"""Systems that triton is not made for skip the tests of what measures its kernels."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["test_gpu_*", "test_tune*"]
