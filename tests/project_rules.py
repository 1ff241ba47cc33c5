"""The floors, the walls and the house rules, checked on the syntax tree of every module.

Each rule is a function from modules to violations; `test_architecture` asks them of the project, and of snippets that
break them.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("qengine", "converters", "quant_kernels")

#: Where each part of qengine lives; a later entry of the same floor may import an earlier one, never the reverse.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "environment", "imports", "process_end", "interrupts", "config", "logs", "request"),
    ("scheduling",),
    ("parallel",),
    ("layers",),
    ("models",),
    ("runtime",),
    ("tokenizer", "grammars", "startup", "step_stats", "pooling", "answers", "engine", "llm", "evaluation"),
    ("serving", "client", "bench", "commands", "cli", "__main__"),
)
#: The same inside scheduling/, whose modules build on each other in one direction.
SCHEDULING_BASE = ("block_pool", "batch")
CONVERTER_USERS = (
    "qengine.runtime.loader",
    "qengine.runtime.locate",
    "qengine.runtime.opening",
    "qengine.tokenizer.files",
    "qengine.tokenizer.gguf",
    "qengine.evaluation.texts",
    "qengine.commands",
)
LIGHT = (
    "qengine.config",
    "qengine.cli",
    "qengine.logs",
    "qengine.commands.flags",
    "qengine.commands.parsing",
    "qengine.commands.settings",
    "qengine.commands.plan",
    "qengine.models.shapes",
    "qengine.parallel.split",
    "qengine.runtime.advice",
    "qengine.runtime.machine_memory",
    "qengine.runtime.model_bytes",
    "qengine.runtime.opening",
    "qengine.runtime.plan_table",
    "qengine.runtime.planner",
    "qengine.runtime.planning",
    "converters.checkpoint",
    "converters.dummy_headers",
    "converters.files",
    "converters.gguf_headers",
    "converters.open_headers",
    "converters.safetensors_headers",
    "quant_kernels.footprint",
)
WEB = {"fastapi", "starlette", "uvicorn", "pydantic", "httpx", "prometheus_client", "opentelemetry", "aiohttp", "flask"}
#: The same inside quant_kernels/: what describes a weight, what chooses, what computes, what watches.
KERNEL_FLOORS: tuple[tuple[str, ...], ...] = (
    ("footprint", "packed_weight", "scheme", "late", "launching"),
    ("packing", "sharding", "tuning", "tolerance"),
    ("reference", "elementwise", "attention", "sampling"),
    ("ops", "native"),
    ("linear",),
    ("compiled", "stack"),
    ("stack_check",),
    ("resources",),
)
KERNEL_IMPORTS = {"quant_kernels", "torch", "triton", "numpy"}
UNSAFE_MODULES = {"pickle", "cPickle", "pickletools", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
UNSAFE_MODULES |= {"jsonpickle", "runpy", "code", "codeop", "multiprocess", "multiprocessing"}
#: Parts of allowed modules that pickle what they pass on, or compile what they are given.
UNSAFE_PARTS = (
    "concurrent.futures.ProcessPoolExecutor",
    "concurrent.futures.process",
    "logging.handlers.DatagramHandler",
    "logging.handlers.SocketHandler",
    "numpy.core.multiarray",
    "numpy._core.multiarray",
    "torch.distributed.rpc",
    "torch.hub",
    "torch.multiprocessing",
    "torch.package",
    "torch.serialization",
    "torch.utils.cpp_extension",
    "torch.utils.model_zoo",
)
UNSAFE_CALLS = {
    "eval",
    "exec",
    "compile",
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "torch.package.PackageImporter",
    "torch.export.load",
    "torch.save",
}
UNSAFE_CALLS |= {"yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load"}
UNSAFE_CALLS |= {"np.load", "numpy.load", "np.fromregex", "numpy.fromregex"}
#: The same whatever they are called on: torch's collectives of objects, sockets and streams of pickles, import hooks.
UNSAFE_METHODS = {
    *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"),
    *("send_object_list", "recv_object_list", "recv_pyobj", "send_pyobj"),
    *("Unpickler", "load_module", "exec_module", "load_source", "load_state_dict_from_url"),
    *("ProcessPoolExecutor", "FileSystemBytecodeCache", "MemcachedBytecodeCache", "load_bytecode"),
    *("read_pickle", "from_pickle", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"),
}
#: Compiles kernels in processes of its own, on a developer's order, and opens no file of others.
POOL_USERS = ("quant_kernels.resources",)
#: What they import late is in a table of their own.
TABLE_IMPORTERS = ("qengine", "qengine.cli", "qengine.serving.tracing", "quant_kernels.linear.dispatch")
#: Whether a dependency runs a checkpoint's code is not left to its default.
NEEDED_ARGUMENTS = {"from_pretrained": ("trust_remote_code", "False")}
UNSAFE_ARGUMENTS = {
    ("allow_pickle", "True"),
    ("trust_remote_code", "True"),
    ("weights_only", "False"),
    ("shell", "True"),
}
MAX_LINES = 600


@dataclass(frozen=True)
class Module:
    """One source file: its dotted name, its text and its tree."""

    name: str
    text: str
    is_package: bool = False

    @property
    def tree(self) -> ast.Module:
        return _tree(self.text)

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    def violation(self, node: ast.AST | None, what: str) -> str:
        return f"{self.name}:{getattr(node, 'lineno', 1)}: {what}"


@cache
def _tree(text: str) -> ast.Module:
    return ast.parse(text)


Rule = Callable[[Sequence[Module]], Iterator[str]]


@cache
def project() -> tuple[Module, ...]:
    modules = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            modules.append(Module(name, path.read_text(encoding="utf-8"), is_package))
    return tuple(modules)


def within(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def imports(module: Module) -> Iterator[tuple[ast.stmt, str]]:
    """Every module that an import statement may load, with `from a import b` as "a.b"; relative ones made absolute."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - 1 if module.is_package else node.level
                parents = module.name.split(".")
                base = ".".join([*parents[: len(parents) - up], *([base] if base else [])])
            for alias in node.names:
                yield node, f"{base}.{alias.name}"


def calls(module: Module) -> Iterator[tuple[ast.Call, str]]:
    """Every call of a plain or dotted name."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield node, ast.unparse(node.func)


def floor_of(name: str) -> tuple[int, int] | None:
    """(floor, place on it) of a module of qengine; None where there is none."""
    part = name.split(".")[1] if "." in name else ""
    for floor, parts in enumerate(FLOORS, start=1):
        if part in parts:
            return floor, parts.index(part)
    return None


# Floors and walls


def every_part_has_a_floor(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        if module.package == "qengine" and "." in module.name and floor_of(module.name) is None:
            yield module.violation(None, "has no floor; give it one in FLOORS")


def imports_go_down(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        own = floor_of(module.name)
        if own is None:
            continue
        for node, target in imports(module):
            other = floor_of(target) if within(target, "qengine") else None
            if other is not None and other > own:
                yield module.violation(node, f"imports {target}, which is above it")


def scheduling_builds_upwards(modules: Sequence[Module]) -> Iterator[str]:
    """block_pool < batch < everything else in scheduling/."""
    for module in modules:
        place = module.name.removeprefix("qengine.scheduling.")
        if place not in SCHEDULING_BASE:
            continue
        allowed = SCHEDULING_BASE[: SCHEDULING_BASE.index(place) + 1]
        for node, target in imports(module):
            if within(target, "qengine.scheduling") and target.split(".")[2:3] not in [[name] for name in allowed]:
                yield module.violation(node, f"imports {target}, which is above it")


def scheduling_is_pure(modules: Sequence[Module]) -> Iterator[str]:
    yield from _bans(modules, "qengine.scheduling", {"torch", "triton", "numpy", "transformers"})


def scheduling_is_used_from_floor_6(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        own = floor_of(module.name)
        if own is None or own[0] >= 6 or within(module.name, "qengine.scheduling"):
            continue
        for node, target in imports(module):
            if within(target, "qengine.scheduling"):
                yield module.violation(node, f"imports {target} below floor 6")


def converters_know_no_engine(modules: Sequence[Module]) -> Iterator[str]:
    yield from _bans(modules, "converters", {"qengine"})


def few_know_converters(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        if module.package != "qengine" or within(module.name, *CONVERTER_USERS):
            continue
        for node, target in imports(module):
            if within(target, "converters"):
                yield module.violation(node, f"imports {target}; only {', '.join(CONVERTER_USERS)} may")


def kernels_need_little(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        if module.package != "quant_kernels":
            continue
        for node, target in imports(module):
            top = target.partition(".")[0]
            if top not in KERNEL_IMPORTS and top not in sys.stdlib_module_names:
                yield module.violation(node, f"imports {top}; kernels import torch, triton and numpy alone")


def kernels_build_upwards(modules: Sequence[Module]) -> Iterator[str]:
    floors = {part: floor for floor, parts in enumerate(KERNEL_FLOORS) for part in parts}
    for module in modules:
        part = module.name.split(".")[1] if module.name.startswith("quant_kernels.") else None
        if part is None:
            continue
        if part not in floors:
            yield module.violation(None, "has no floor; give it one in KERNEL_FLOORS")
            continue
        for node, target in imports(module):
            other = target.split(".")[1] if target.startswith("quant_kernels.") else part
            if floors.get(other, 0) > floors[part]:
                yield module.violation(node, f"imports {target}, which is above it")


def web_stays_on_floor_8(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        if not within(module.name, "qengine.serving", "qengine.cli"):
            yield from _banned_imports(module, WEB)


def the_command_line_is_light(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        if module.name in LIGHT:
            yield from _banned_imports(module, {"torch", "triton", "transformers", *WEB})


def transformers_is_never_imported_at_module_level(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        yield from _banned_imports(module, {"transformers"})


def models_know_no_processes(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        if not within(module.name, "qengine.models", "qengine.layers"):
            continue
        for node, target in imports(module):
            if within(target, "torch.distributed"):
                yield module.violation(node, "imports torch.distributed")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"):
                yield module.violation(node, "uses torch.distributed")


def layers_never_hear_of_formats(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        if within(module.name, "qengine.layers"):
            for number, line in enumerate(module.text.splitlines(), start=1):
                if re.search("gptq|awq|gguf", line, re.IGNORECASE):
                    yield f"{module.name}:{number}: mentions a file format"


def no_import_cycles(modules: Sequence[Module]) -> Iterator[str]:
    names = {module.name for module in modules}
    edges = {module.name: {found for found in _targets(module, names) if found != module.name} for module in modules}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> Iterator[str]:
        if name in path:
            yield " -> ".join([*path[path.index(name) :], name])
        elif name not in done:
            for target in sorted(edges[name]):
                yield from visit(target, (*path, name))
            done.add(name)

    for name in sorted(names):
        yield from visit(name, ())


def _targets(module: Module, names: set[str]) -> Iterator[str]:
    """The project's modules that an import loads: `from a import b` is a.b where that is a module, else a."""
    typing_only = {
        id(inner)
        for node in ast.walk(module.tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node, target in imports(module):
        if id(node) not in typing_only:
            found = target if target in names else target.rpartition(".")[0]
            if found in names:
                yield found


def _bans(modules: Sequence[Module], prefix: str, banned: set[str]) -> Iterator[str]:
    for module in modules:
        if within(module.name, prefix):
            yield from _banned_imports(module, banned)


def _banned_imports(module: Module, banned: set[str]) -> Iterator[str]:
    for node, target in imports(module):
        if target.partition(".")[0] in banned:
            yield module.violation(node, f"imports {target}")


# House rules


def imports_stand_at_the_top(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        for function in ast.walk(module.tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                for node in ast.walk(function):
                    if isinstance(node, ast.Import | ast.ImportFrom):
                        yield module.violation(node, "imports inside a function; use qengine.imports.import_late")


def one_module_imports_by_name(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        if module.name in ("qengine.imports", "quant_kernels.late", "converters.late"):
            continue
        for node, name in calls(module):
            if name in ("importlib.import_module", "import_module", "__import__"):
                yield module.violation(node, f"calls {name}; use qengine.imports.import_late")


def late_imports_are_spelled_out(modules: Sequence[Module]) -> Iterator[str]:
    """A name that is made of something else could be made of a checkpoint's."""
    for module in modules:
        if module.name in TABLE_IMPORTERS:
            continue
        for node, name in calls(module):
            is_late = name.rpartition(".")[2] in ("import_late", "try_import")
            if is_late and not (node.args and isinstance(node.args[0], ast.Constant)):
                yield module.violation(node, f"calls {name} with a name that is not spelled out")


def one_module_reads_the_environment(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        if module.name == "qengine.environment":
            continue
        for node, target in imports(module):
            if target in ("os.environ", "os.getenv", "os.environb"):
                yield module.violation(node, f"imports {target}; ask qengine.environment")
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.environb"):
                yield module.violation(node, f"reads {ast.unparse(node)}; ask qengine.environment")


def no_global_state(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Global):
                yield module.violation(node, "uses global")


def no_bare_except(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                yield module.violation(node, "catches everything; name the exceptions")


def modules_open_with_a_docstring(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        if not (ast.get_docstring(module.tree) or "").strip():
            yield module.violation(None, "has no docstring")


def nothing_runs_foreign_code(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        if module.name in POOL_USERS:
            module = Module(module.name, module.text.replace("ProcessPoolExecutor", "a_pool"))
        yield from _unsafe_imports(module)
        for node, name in calls(module):
            yield from (module.violation(node, f"calls {name}{why}") for why in _unsafe_about(node, name))


def _unsafe_imports(module: Module) -> Iterator[str]:
    for node, target in imports(module):
        top, last = target.partition(".")[0], target.rpartition(".")[2]
        if top in UNSAFE_MODULES or within(target, *UNSAFE_PARTS) or target in UNSAFE_CALLS or last in UNSAFE_METHODS:
            yield module.violation(node, f"imports {target}")
    for part in ast.walk(module.tree):
        if isinstance(part, ast.Attribute) and within(ast.unparse(part), *UNSAFE_PARTS):
            yield module.violation(part, f"uses {ast.unparse(part)}")


def _unsafe_about(node: ast.Call, name: str) -> Iterator[str]:
    """What is wrong with a call, as words to follow its name."""
    method = name.rpartition(".")[2]
    arguments = {(given.arg, ast.unparse(given.value)) for given in node.keywords}
    if name in UNSAFE_CALLS or method in UNSAFE_METHODS:
        yield ""
    for argument, value in sorted(UNSAFE_ARGUMENTS & arguments):
        yield f" with {argument}={value}"
    needed = NEEDED_ARGUMENTS.get(method)
    if needed and needed not in arguments:
        yield f" without {needed[0]}={needed[1]}"


def only_commands_print(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        own = floor_of(module.name)
        if own is not None and own[0] == 8:
            continue
        for node, name in calls(module):
            if name == "print":
                yield module.violation(node, "prints; log, or raise an error")


def files_are_short(modules: Sequence[Module]) -> Iterator[str]:
    for module in modules:
        num_lines = len(module.text.splitlines())
        if num_lines > MAX_LINES:
            yield module.violation(None, f"has {num_lines} lines, at most {MAX_LINES}")
