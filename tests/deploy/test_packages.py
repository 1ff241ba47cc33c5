"""What an installed package holds: unless it is an editable one, only what pyproject.toml names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quant_kernels.tuning.card import KNOWN_CARDS
from quant_kernels.tuning.table import table_path

tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")

ROOT = Path(__file__).parents[2]
#: Sources of what is compiled, and the record of a check that is for those who change kernels.
LEFT_OUT = ("native/src/*", "compiled/record.json")


def setuptools_options() -> Any:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]


@pytest.mark.parametrize("package", ["converters", "qengine", "quant_kernels"])
def test_every_file_that_is_no_module_is_named(package: str) -> None:
    options = setuptools_options()
    assert f"{package}*" in options["packages"]["find"]["include"]
    folder = ROOT / package
    named = {file for pattern in (*options["package-data"][package], *LEFT_OUT) for file in folder.glob(pattern)}
    files = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    forgotten = {file for file in files if file.suffix not in (".py", ".so")} - named
    assert not forgotten, f"pyproject.toml's package-data leaves out {sorted(map(str, forgotten))}"


def test_a_tuning_table_would_be_there() -> None:
    """`make tune` writes them; there may be none yet."""
    table = table_path(KNOWN_CARDS["4090"]).relative_to(ROOT / "quant_kernels")
    assert any(table.match(pattern) for pattern in setuptools_options()["package-data"]["quant_kernels"])
