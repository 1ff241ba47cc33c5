"""A program for test_server: run_server with a scripted engine.

python -m tests.serving.serve_scripted '{"port": 0}'
"""

from __future__ import annotations

import json
import sys
from typing import Any

from qengine.config import EngineConfig
from qengine.serving.server import ServerOptions, run_server
from tests.serving.scripted_engine import ScriptedEngine


def _start(config: EngineConfig) -> Any:
    return ScriptedEngine()


if __name__ == "__main__":
    sys.exit(run_server(EngineConfig(), ServerOptions(**json.loads(sys.argv[1])), start_engine=_start))
