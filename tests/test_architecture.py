"""The project keeps its rules, and each rule catches a snippet that breaks it, so that none can pass by being blind."""

from __future__ import annotations

import pytest

from tests.project_rules import (
    MAX_LINES,
    Module,
    Rule,
    converters_know_no_engine,
    every_part_has_a_floor,
    few_know_converters,
    files_are_short,
    imports_go_down,
    imports_stand_at_the_top,
    kernels_build_upwards,
    kernels_need_little,
    late_imports_are_spelled_out,
    layers_never_hear_of_formats,
    models_know_no_processes,
    modules_open_with_a_docstring,
    no_bare_except,
    no_global_state,
    no_import_cycles,
    nothing_runs_foreign_code,
    one_module_imports_by_name,
    one_module_reads_the_environment,
    only_commands_print,
    project,
    scheduling_builds_upwards,
    scheduling_is_pure,
    scheduling_is_used_from_floor_6,
    the_command_line_is_light,
    transformers_is_never_imported_at_module_level,
    web_stays_on_floor_8,
)

#: rule -> (module name, snippet) pairs that break it.
RULES: dict[Rule, tuple[tuple[str, str], ...]] = {
    every_part_has_a_floor: (("qengine.attic", ""),),
    imports_go_down: (
        ("qengine.layers.norm", "from qengine.models.llama import SPEC"),
        ("qengine.layers.norm", "import qengine.serving.server"),
        ("qengine.layers.norm", "from ..models import llama"),
        ("qengine.layers.norm", "from qengine import engine"),
        ("qengine.layers.norm", "def late():\n    from qengine.engine import Engine"),
        ("qengine.tokenizer.gguf", "from qengine.engine import Engine"),
        ("qengine.engine", "from qengine.llm import LLM"),
        ("qengine.errors", "from qengine.config import EngineConfig"),
        ("qengine.config", "from qengine.request import Request"),
        ("qengine.serving.server", "from qengine.cli import main"),
    ),
    scheduling_builds_upwards: (
        ("qengine.scheduling.batch", "from qengine.scheduling.scheduler import Scheduler"),
        ("qengine.scheduling.block_pool", "from qengine.scheduling.batch import Batch"),
        ("qengine.scheduling.block_pool", "from .batch import Batch"),
    ),
    scheduling_is_pure: (("qengine.scheduling.scheduler", "import torch"),),
    scheduling_is_used_from_floor_6: (("qengine.models.decoder", "from qengine.scheduling.batch import Batch"),),
    converters_know_no_engine: (("converters.formats.gptq", "from qengine.errors import LoadError"),),
    few_know_converters: (
        ("qengine.engine", "from converters.open import open_checkpoint"),
        ("qengine.runtime.loader_helper", "import converters"),
    ),
    kernels_need_little: (
        ("quant_kernels.packing", "from converters.source import WeightSource"),
        ("quant_kernels.packing", "import safetensors.torch"),
    ),
    kernels_build_upwards: (
        ("quant_kernels.attic", ""),
        ("quant_kernels.tuning.select", "from quant_kernels.linear.p16.layout import pack"),
        ("quant_kernels.elementwise.rms_norm", "import quant_kernels.linear.dispatch"),
        ("quant_kernels.packed_weight", "from quant_kernels.packing import pack_codes"),
    ),
    web_stays_on_floor_8: (
        ("qengine.engine", "import fastapi"),
        ("qengine.llm", "from pydantic import BaseModel"),
        ("qengine.commands.chat", "import uvicorn"),
        ("qengine.engine", "from prometheus_client import Counter"),
        ("qengine.engine", "from opentelemetry import trace"),
    ),
    the_command_line_is_light: (
        ("qengine.cli", "import torch"),
        ("qengine.config", "from triton import language"),
        ("qengine.runtime.planner", "from torch import Tensor"),
    ),
    transformers_is_never_imported_at_module_level: (("qengine.tokenizer.rust_errors", "import transformers"),),
    models_know_no_processes: (
        ("qengine.models.llama", "import torch.distributed as dist"),
        ("qengine.models.llama", "from torch import distributed"),
        ("qengine.layers.linear", "import torch\ntorch.distributed.all_reduce(x)"),
    ),
    layers_never_hear_of_formats: (("qengine.layers.linear", "# as in AutoAWQ"),),
    imports_stand_at_the_top: (
        ("qengine.engine", "def f():\n    import json"),
        ("converters.open", "class A:\n    async def f(self):\n        from json import loads"),
    ),
    one_module_imports_by_name: (
        ("qengine.engine", "import importlib\nimportlib.import_module('torch')"),
        ("qengine.engine", "__import__('torch')"),
    ),
    one_module_reads_the_environment: (
        ("qengine.engine", "import os\nos.environ['HOME']"),
        ("converters.open", "import os\nos.getenv('HOME')"),
        ("qengine.cli", "from os import environ"),
    ),
    no_global_state: (("qengine.engine", "def f():\n    global engine"),),
    no_bare_except: (("qengine.engine", "try:\n    pass\nexcept:\n    pass"),),
    modules_open_with_a_docstring: (("qengine.engine", "import json"), ("qengine.engine", '""" """')),
    nothing_runs_foreign_code: (
        ("qengine.engine", "import pickle"),
        ("qengine.engine", "from torch import load"),
        ("converters.open", "import torch\ntorch.load('x')"),
        ("converters.open", "eval('1')"),
        ("converters.open", "import numpy as np\nnp.load('x', allow_pickle=True)"),
        ("converters.open", "f(trust_remote_code=True)"),
        ("qengine.parallel.group", "import torch\ntorch.distributed.broadcast_object_list([])"),
        ("qengine.engine", "import subprocess\nsubprocess.run('ls', shell=True)"),
        ("qengine.commands.parsing", "import yaml\nyaml.load('x')"),
        ("qengine.runtime.rank", "import multiprocessing"),
        ("qengine.runtime.rank", "from multiprocessing.connection import Client"),
        ("qengine.runtime.rank", "from torch import multiprocessing"),
        ("qengine.runtime.rank", "import torch\ntorch.multiprocessing.spawn(f)"),
        ("qengine.runtime.rank", "import concurrent.futures\nconcurrent.futures.ProcessPoolExecutor()"),
        ("qengine.runtime.rank", "from concurrent.futures import ProcessPoolExecutor"),
        ("qengine.runtime.rank", "from concurrent.futures.process import ProcessPoolExecutor as Pool"),
        *(
            ("qengine.parallel.group", f"import torch.distributed as dist\ndist.{name}([])")
            for name in ("all_gather_object", "gather_object", "scatter_object_list")
        ),
        *(
            ("qengine.parallel.group", f"from torch.distributed import {name} as passed")
            for name in ("send_object_list", "recv_object_list", "broadcast_object_list")
        ),
        ("qengine.parallel.group", "import torch.distributed.rpc"),
        ("converters.open", "from numpy.core import multiarray"),
        ("converters.open", "import numpy as np\nimport numpy.core.multiarray"),
        ("converters.open", "from torch.serialization import load as read"),
        ("converters.open", "import torch\ntorch.serialization.load('x')"),
        ("converters.open", "import torch\ntorch.export.load('x')"),
        ("converters.open", "import pandas\npandas.read_pickle('x')"),
        (
            "converters.open",
            "from importlib.machinery import SourceFileLoader\nSourceFileLoader('a', 'b').load_module()",
        ),
        ("converters.encoder", "AutoTokenizer.from_pretrained('x')"),
        ("converters.encoder", "AutoTokenizer.from_pretrained('x', trust_remote_code=flag)"),
        ("qengine.tokenizer.chat_template", "from jinja2 import FileSystemBytecodeCache"),
        ("qengine.logs", "import logging.handlers\nlogging.handlers.SocketHandler('h', 1)"),
    ),
    late_imports_are_spelled_out: (
        ("qengine.runtime.loader", "from qengine.imports import import_late\nimport_late(config['auto_map'])"),
        ("qengine.runtime.loader", "from qengine import imports\nimports.import_late(f'models.{name}')"),
        ("quant_kernels.linear.choice", "try_import(name)"),
    ),
    only_commands_print: (("qengine.engine", "print('x')"), ("converters.open", "print('x')")),
    files_are_short: (("qengine.engine", "x = 1\n" * (MAX_LINES + 1)),),
}


def _name(rule: Rule) -> str:
    return rule.__name__


def test_the_project_was_found() -> None:
    names = {module.name for module in project()}
    assert {"qengine.config", "qengine.cli", "converters.source", "quant_kernels.packed_weight"} <= names
    assert len(names) > 30


@pytest.mark.parametrize("rule", [*RULES, no_import_cycles], ids=_name)
def test_the_project_keeps(rule: Rule) -> None:
    violations = list(rule(project()))
    assert not violations, "\n".join(violations)


@pytest.mark.parametrize(
    ("rule", "name", "snippet"),
    [
        pytest.param(rule, *broken, id=f"{_name(rule)}-{i}")
        for rule, all_ in RULES.items()
        for i, broken in enumerate(all_)
    ],
)
def test_a_rule_catches(rule: Rule, name: str, snippet: str) -> None:
    assert list(rule([Module(name, snippet)])), f"{_name(rule)} let this pass in {name}:\n{snippet}"


def test_a_cycle_is_caught() -> None:
    cycle = [Module("qengine.a", "import qengine.b"), Module("qengine.b", "from qengine.a import x")]
    assert list(no_import_cycles(cycle)) == ["qengine.a -> qengine.b -> qengine.a"]
    types_only = Module("qengine.b", "if TYPE_CHECKING:\n    from qengine.a import x")
    assert not list(no_import_cycles([cycle[0], types_only]))


@pytest.mark.parametrize(
    ("rule", "name", "snippet"),
    [
        (imports_go_down, "qengine.llm", "from qengine.engine import Engine"),
        (imports_go_down, "qengine.models.llama", "from qengine.models.spec import ModelSpec"),
        (imports_go_down, "qengine", "from qengine.llm import LLM"),
        (few_know_converters, "qengine.runtime.loader", "from converters.open import open_checkpoint"),
        (kernels_need_little, "quant_kernels.packing", "import torch, math\nimport numpy as np"),
        (scheduling_builds_upwards, "qengine.scheduling.batch", "from qengine.scheduling.block_pool import BlockPool"),
        (nothing_runs_foreign_code, "qengine.llm", "import re\nre.compile('x')\nmodel.eval()"),
        (one_module_reads_the_environment, "qengine.environment", "import os\nos.environ['HOME']"),
        (only_commands_print, "qengine.commands.chat", "print('x')"),
    ],
    ids=lambda value: _name(value) if callable(value) else None,
)
def test_a_rule_lets_pass(rule: Rule, name: str, snippet: str) -> None:
    assert not list(rule([Module(name, snippet)]))
