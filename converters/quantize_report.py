"""report.json of a quantized checkpoint: what was asked for, and what became of each linear.

Invariant: it lies in the checkpoint itself, so that what was done differently from what was asked (rounding where a
Hessian could not be factorized, more damping) can be read as long as the weights can.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.export_folder import OutputFolder
from converters.files import read_json_object
from converters.quantize_state import differences
from converters.quantizers import LinearReport

REPORT = "report.json"


@dataclass(frozen=True, slots=True)
class QuantReport:
    """The file's content.

    Attributes:
        request: all that decides the result, by name.
        weight_bytes: of all tensors.
        linears: a line for each.
    """

    request: Mapping[str, Any]
    weight_bytes: int
    linears: tuple[LinearReport, ...]

    def write(self, folder: OutputFolder) -> None:
        """Raises WriteError."""
        lines = [{key: _said(value) for key, value in asdict(line).items()} for line in self.linears]
        folder.write_json(REPORT, {"request": dict(self.request), "weight_bytes": self.weight_bytes, "linears": lines})

    @staticmethod
    def read(folder: Path) -> QuantReport:
        """Of a checkpoint that `quantize` has written. Raises CheckpointError."""
        found = read_json_object(folder / REPORT)
        try:
            lines = [{**line, "notes": tuple(line["notes"])} for line in found["linears"]]
            linears = tuple(LinearReport(**{key: _read(key, value) for key, value in line.items()}) for line in lines)
            return QuantReport(found["request"], found["weight_bytes"], linears)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / REPORT} is not a report of qengine quantize: {error!r}") from error


def complete_report(folder: OutputFolder, asked: Mapping[str, Any]) -> QuantReport | None:
    """That of a checkpoint which only lacks its name, as a run ended just before it had one; None if there is none.

    Raises:
        CheckpointError: if something else was asked for.
    """
    if not folder.is_complete:
        return None
    found = QuantReport.read(folder.partial)
    if found.request != asked:
        raise CheckpointError(
            f"{folder.partial} is a complete checkpoint of another run ({differences(found.request, asked)}) that only "
            "lacks its name: rename it, or remove it"
        )
    return found


def notes(report: Sequence[LinearReport]) -> list[str]:
    """What the user should know of single linears, a line for each note."""
    return [f"note: {line.name}: {note}" for line in report for note in line.notes]


def as_plain(request: Mapping[str, Any]) -> dict[str, Any]:
    """A request in JSON's own types, as it is read back."""
    plain: dict[str, Any] = json.loads(json.dumps(request))
    return plain


def _said(value: Any) -> Any:
    """JSON has no NaN: what was not measured is null."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _read(key: str, value: Any) -> Any:
    return math.nan if value is None and key in ("error", "rtn_error") else value
