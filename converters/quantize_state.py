"""What a quantization keeps on disk while it runs, so that it can be killed at any moment and go on.

::

    work/state.json              what was asked for, how many layers are done, their reports; replaced at once
    work/layer-00003.safetensors the records of a finished layer
    work/hidden-00004.bin        what the next layer is given: see `hidden_states`

Invariant: everything that state.json counts is complete and synced; a run that goes on with it writes the same bytes as
one that was never stopped. A state of another model, calibration or setting is refused, naming what differs; one of
another device, torch or number of threads goes on, with a warning, as its sums differ in their last bits.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from converters.checkpoint import read_header
from converters.errors import CheckpointError
from converters.files import DataFile, read_json_object
from converters.quantizers import LayerResult, LinearReport
from converters.safetensors_writer import replace_file, write_safetensors
from converters.tensors import ReadableCheckpoint
from quant_kernels.packed_weight import PackedWeight

_STATE = "state.json"
_TENSORS = ("codes", "scales", "zeros", "perm", "bias")
_NUMBERS = ("bits", "group_size", "in_features", "out_features", "zero_const")
_RECORD, _CHANGED = "record:", "tensor:"

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class RunState:
    """How far a run has come.

    Attributes:
        folder: the work folder.
        request: all that decides the result, in JSON's types.
        machine: what decides its last bits, in the same.
        finished: parts that are done: the layers, then the head if it is quantized.
        report: of all finished parts.
        seconds: that they took, over all runs.
    """

    folder: Path
    request: Mapping[str, Any]
    machine: Mapping[str, Any]
    finished: int = 0
    report: list[LinearReport] = field(default_factory=list)
    seconds: float = 0.0

    @staticmethod
    def begin(folder: Path, request: Mapping[str, Any], machine: Mapping[str, Any]) -> RunState:
        """The state that an earlier run left in `folder`, or a fresh one.

        Raises:
            CheckpointError: if it is of another request, with what differs.
        """
        request, machine = json.loads(json.dumps([request, machine]))
        state = RunState(folder, request, machine)
        if not (folder / _STATE).is_file():
            return state
        found = read_json_object(folder / _STATE)
        earlier = found.get("request")
        if not isinstance(earlier, dict) or earlier != request:
            changes = differences(earlier if isinstance(earlier, dict) else {}, request)
            raise CheckpointError(
                f"{folder.parent} holds the work of another run ({changes}); ask for the same to go on with it, or "
                "remove that folder to begin anew"
            )
        if found.get("machine") != machine:
            logger.warning(
                "the finished layers were computed elsewhere (%s): the result is as good, but not the same bytes as "
                "that of one run",
                differences(found.get("machine") or {}, machine),
            )
        state.finished, state.seconds = found["finished"], found["seconds"]
        state.report = [LinearReport(**{**line, "notes": tuple(line["notes"])}) for line in found["report"]]
        return state

    def keep(self, result: LayerResult, names: Mapping[str, str]) -> None:
        """Write the records of the next part, but do not count it yet.

        Args:
            names: checkpoint name of each module and tensor of the result.

        Raises:
            WriteError: if the disk is full.
        """
        tensors: dict[str, torch.Tensor] = {}
        metadata: dict[str, str] = {}
        for own, weight in result.weights.items():
            metadata[names[own]] = json.dumps({key: getattr(weight, key) for key in _NUMBERS} | {"of": weight.origin})
            parts = ((part, getattr(weight, part)) for part in _TENSORS)
            tensors |= {f"{_RECORD}{names[own]}:{part}": t for part, t in parts if t is not None}
        tensors |= {f"{_CHANGED}{names[own]}": tensor for own, tensor in result.tensors.items()}
        write_safetensors(self.records_path(self.finished), tensors, metadata)

    def count(self, report: list[LinearReport], seconds: float) -> None:
        """Count the next part, whose records and hidden states are on the disk. Raises WriteError."""
        self.finished += 1
        self.report += report
        self.seconds += seconds
        self.save()

    def save(self) -> None:
        """Replace state.json. Raises WriteError."""
        value = {
            "request": self.request,
            "machine": self.machine,
            "finished": self.finished,
            "seconds": self.seconds,
            "report": [asdict(line) for line in self.report],
        }
        replace_file(self.folder / _STATE, json.dumps(value).encode())

    def records_path(self, part: int) -> Path:
        """Where the records of a part lie."""
        return self.folder / f"layer-{part:05d}.safetensors"

    def read(self, part: int) -> FinishedPart:
        """The records of a finished part."""
        infos, metadata = read_header(DataFile.at(self.records_path(part)))
        file = ReadableCheckpoint(self.folder, {info.name: info for info in infos}, metadata)
        return FinishedPart(file)


def has_finished_layers(folder: Path) -> bool:
    """Whether a run has left anything that is worth keeping."""
    return (folder / _STATE).is_file()


def num_finished(folder: Path) -> int:
    """How many parts an ended run has left; 0 where nothing can be read."""
    try:
        return int(read_json_object(folder / _STATE)["finished"])
    except (CheckpointError, KeyError, TypeError, ValueError):
        return 0


class FinishedPart:
    """Records and changed tensors of one part, read as they are asked for."""

    def __init__(self, file: ReadableCheckpoint) -> None:
        self._file = file

    @property
    def records(self) -> list[str]:
        """Modules that were quantized."""
        return list(self._file.metadata)

    def record(self, name: str) -> PackedWeight:
        """The record of a module."""
        facts = json.loads(self._file.metadata[name])
        origin = facts.pop("of")
        parts = {part: f"{_RECORD}{name}:{part}" for part in _TENSORS}
        tensors: dict[str, Any] = {
            part: self._file.read(key) for part, key in parts.items() if key in self._file.tensors
        }
        return PackedWeight(**facts, **tensors, origin=origin)

    def changed(self, name: str) -> torch.Tensor | None:
        """A tensor that is not quantized but absorbed a factor; None if it did not."""
        key = _CHANGED + name
        return self._file.read(key) if key in self._file.tensors else None


def differences(earlier: Mapping[str, Any], request: Mapping[str, Any]) -> str:
    """Which entries of a request changed, and how, for a message."""
    keys = [key for key in {**earlier, **request} if earlier.get(key) != request.get(key)]

    def said(values: Mapping[str, Any], key: str) -> str:
        text = json.dumps(values.get(key))
        return text if len(text) <= 60 else text[:57] + "..."

    return "; ".join(f"{key} was {said(earlier, key)}, now {said(request, key)}" for key in keys)
