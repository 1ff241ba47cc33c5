"""The package stands alone: it imports no engine, and nothing that could run what a file contains."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import importlib, pkgutil, sys, torch
before = set(sys.modules)
import converters
names = [module.name for module in pkgutil.walk_packages(converters.__path__, "converters.")]
for name in names:
    importlib.import_module(name)
loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
print(len(names), *sorted(loaded & {"qengine", "pickle", "cloudpickle", "dill", "joblib", "safetensors", "gguf"}))
"""


def test_what_the_package_imports() -> None:
    """In a process of its own, because the tests have long imported the engine; torch itself imports pickle."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    num_modules, *forbidden = done.stdout.split()
    assert int(num_modules) > 5
    assert not forbidden


def test_no_source_mentions_a_loader_of_pickles() -> None:
    for path in (ROOT / "converters").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        for word in ("import pickle", "torch.load", "Unpickler", "import qengine", "from qengine"):
            assert word not in source, f"{path.name}: {word}"
