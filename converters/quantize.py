"""Quantize a model on the machine that one has: one decoder layer in memory at a time, every finished layer on disk.

    embed the calibration -> for each layer: load, run, quantize, run again, keep -> assemble the checkpoint

Invariant: a run that is killed at any moment and resumed writes the same bytes as one that was not; the output appears
under its name when it is complete (see `export_folder`). Also a script: ``python -m converters.quantize --help``.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from converters.calibrate import CalibrationSet, TextEncoder, calibration_set
from converters.encoder import HubEncoder
from converters.errors import CheckpointError, WriteError
from converters.export_files import (
    CARD,
    PROJECT_VERSION,
    Producer,
    check_companions,
    model_card,
    quantization_config,
    write_companions,
    write_configs,
)
from converters.export_folder import OutputFolder, require_space
from converters.export_shards import ShardWriter
from converters.export_tensors import cast, linear_tensors
from converters.hidden_states import HiddenStates
from converters.layers import LayerRunner, full_name, load_head, load_layer, unload, view_head, view_layer
from converters.open import open_checkpoint
from converters.quantize_fit import check_model, dense_dtype, export_scheme, quantizer_settings
from converters.quantize_identity import machine, model_identity, model_name
from converters.quantize_memory import PeakMemory, give_memory_back, plan_memory
from converters.quantize_outcome import Observer, Preview, Quantized, plan_lines, result_lines
from converters.quantize_report import QuantReport, as_plain, complete_report
from converters.quantize_request import FORMATS, QuantRequest, make_request
from converters.quantize_state import FinishedPart, RunState, has_finished_layers
from converters.quantizers import LayerView, QuantizationError, quantize_layer
from converters.safetensors_writer import make_folder
from converters.skeleton import EMBEDDING, HEAD, OpenedModel
from converters.source import LinearSlot, TensorSlot, WeightSource
from quant_kernels.packed_weight import PackedWeight

logger = logging.getLogger(__name__)

#: Makes the tokenizer of a source that was opened at a path.
OpenEncoder = Callable[[WeightSource, Path], TextEncoder]

#: Tokens of a batch, unless a single sample has more.
_BATCH_TOKENS = 4096


def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    method: str = "gptq",
    bits: int = 4,
    group_size: int = 128,
    sym: bool | None = None,
    act_order: bool = False,
    format: str | None = None,
    calibration: str = "builtin",
    num_samples: int = 128,
    seq_len: int = 2048,
    device: str = "auto",
    resume: bool = False,
    skip: str | None = None,
    lm_head: bool = False,
    name: str | None = None,
    encoder: TextEncoder | None = None,
    open_encoder: OpenEncoder = HubEncoder.open,
    observer: Observer | None = None,
    show_progress: bool = False,
) -> Quantized:
    """Quantize a model and write it as a checkpoint.

    Args:
        model: a folder of safetensors, or a GGUF file.
        out: the folder to write, which must not exist.
        method: "rtn", "gptq", "awq" or "auto".
        sym: the zero point is the middle of the range; None is what the method's format usually has.
        format: "awq", "gptq" or "compressed-tensors"; None is the method's own.
        calibration: "builtin", a .txt or .jsonl file, or a dataset of the hub.
        device: "auto", "cpu", "cuda" or "cuda:N".
        resume: go on with what an earlier run left.
        skip: a regular expression; modules in whose full name it is found stay dense.
        lm_head: quantize the head too.
        name: of the model, for the card; None takes the path's last part.
        encoder: the tokenizer; None opens the model's own, if calibration needs one.
        open_encoder: how to open it; the engine gives its own, which also runs chat templates.
        observer: is told what will be and what has been done.

    Raises:
        CheckpointError: if the model or the calibration cannot be read, or the request contradicts itself or the model.
        QuantizationError: if weights or activations are not finite.
        WriteError: if the disk is full or read-only; finished layers are kept for `resume`.
    """
    request = make_request(
        method=method,
        bits=bits,
        group_size=group_size,
        sym=sym,
        act_order=act_order,
        format=format,
        skip=skip,
        lm_head=lm_head,
    )
    path = Path(model)
    source = open_checkpoint(path)
    check_companions(source, path)
    opened = OpenedModel.check(source)
    linears = check_model(request, opened.skeleton)
    chosen = _device(device)
    samples = None
    if request.needs_calibration:
        found = encoder if encoder is not None else open_encoder(source, path)
        samples = _calibrate(path, opened, calibration, found, num_samples, seq_len)
    batches = [] if samples is None else _batches(samples)
    memory = plan_memory(
        opened.skeleton,
        linears,
        [batch.size for batch in batches],
        method=request.method,
        tied=opened.tied and not request.lm_head,
        on_gpu=chosen.type == "cuda",
    )
    peak = PeakMemory(chosen)
    producer = _producer(request, samples, name or model_name(path))
    asked = as_plain({**request.as_json(), "model": producer.made_from, **producer.details, "by": PROJECT_VERSION})
    with _output(Path(out), path, resume) as folder:
        if not folder.work.is_dir() and not folder.is_complete:
            require_space(folder.out, memory.disk)
            make_folder(folder.work)
        state = RunState.begin(folder.work, {**asked, "files": model_identity(path)}, machine(chosen))
        complete = complete_report(folder, asked)
        if complete is not None:
            state.finished, state.report = opened.skeleton.num_layers + request.lm_head, list(complete.linears)
        watcher = observer or Observer()
        watcher.begins(
            Preview(
                request,
                source.description,
                opened.skeleton.num_layers,
                len(linears),
                state.finished,
                samples,
                memory,
                chosen,
            )
        )
        if complete is None:
            run = _Run(request, opened, source, chosen, batches, state, watcher, show_progress)
            run.all_parts()
            complete = _assemble(folder, run, producer, path, memory.shard, asked)
        else:
            folder.publish()
    return Quantized(
        folder.out, complete.linears, state.seconds, complete.weight_bytes, memory, peak.host, peak.on_device, samples
    )


# Before


@contextmanager
def _output(out: Path, source: Path, resume: bool) -> Iterator[OutputFolder]:
    """The folder; what ends the block early leaves it only if there are finished layers, and a layer is no failure."""
    folder = OutputFolder.create(out, source=source, resume=resume)
    was_there = folder.work.is_dir()
    try:
        yield folder
    except QuantizationError:
        # The same would happen again, and what was asked for instead would be another run.
        folder.discard()
        raise
    except BaseException:
        if not was_there and not has_finished_layers(folder.work):
            folder.discard()
        raise
    finally:
        folder.close()


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise CheckpointError(f"device '{name}' is not known, expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise CheckpointError(f"device '{name}' is not supported, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CheckpointError(f"device '{name}' is not there: torch sees {torch.cuda.device_count()} GPUs")
    return device


def _calibrate(
    path: Path,
    opened: OpenedModel,
    calibration: str,
    encoder: TextEncoder,
    num_samples: int,
    seq_len: int,
) -> CalibrationSet:
    config = opened.skeleton.config
    longest = config.max_position_embeddings
    if seq_len > longest:
        logger.warning("samples are cut to %d tokens, the model's longest context, and not to %d", longest, seq_len)
        seq_len = longest
    samples = calibration_set(calibration, encoder, num_samples=num_samples, seq_len=seq_len)
    most = max(int(sample.max()) for sample in samples.samples)
    if most >= config.vocab_size:
        raise CheckpointError(
            f"{path}: its tokenizer gives id {most}, but the embedding has {config.vocab_size} rows; they are not "
            "of the same model"
        )
    return samples


@dataclass(frozen=True, slots=True)
class _Batch:
    """Samples of one length, int64 [B, T], and their numbers in the calibration set."""

    ids: torch.Tensor
    numbers: tuple[int, ...]

    @property
    def size(self) -> tuple[int, int]:
        return len(self.ids), self.ids.shape[1]


def _batches(samples: CalibrationSet) -> list[_Batch]:
    """Samples of one length side by side, in the order in which lengths first occur."""
    by_length: dict[int, list[int]] = {}
    for number, sample in enumerate(samples.samples):
        by_length.setdefault(len(sample), []).append(number)
    batches = []
    for length, alike in by_length.items():
        step = max(1, _BATCH_TOKENS // length)
        for start in range(0, len(alike), step):
            numbers = tuple(alike[start : start + step])
            batches.append(_Batch(torch.stack([samples.samples[number] for number in numbers]), numbers))
    return batches


# Layer by layer


class _Inputs:
    """See `quantizers.LayerInputs`."""

    def __init__(
        self,
        states: HiddenStates,
        runner: LayerRunner,
        index: int | None,
        batches: Sequence[_Batch],
        device: torch.device,
    ) -> None:
        self._states = states
        self._runner = runner
        self._index = index
        self._batches = batches
        self._device = device

    def __len__(self) -> int:
        return len(self._batches)

    def hidden(self, index: int) -> torch.Tensor:
        return self._states.read(index).to(self._device)

    def sample(self, index: int, row: int) -> int:
        return self._batches[index].numbers[row]

    def run(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        return self._runner.run(self._index, module, hidden)


@dataclass(slots=True)
class _Run:
    """The parts of one model, from where an earlier run left off. Part i is layer i; the head comes last."""

    request: QuantRequest
    opened: OpenedModel
    source: WeightSource
    device: torch.device
    batches: Sequence[_Batch]
    state: RunState
    observer: Observer
    show_progress: bool
    runner: LayerRunner = field(init=False)

    def __post_init__(self) -> None:
        self.runner = LayerRunner(self.opened.skeleton, self.device)

    @property
    def num_layers(self) -> int:
        return self.opened.skeleton.num_layers

    @property
    def num_parts(self) -> int:
        return self.num_layers + self.request.lm_head

    @torch.no_grad()
    def all_parts(self) -> None:
        first = self.state.finished
        if first == self.num_parts:
            return
        states = self._states(first) if self.batches else None
        if first == 0 and states is not None:
            self._embed(states)
        parts = range(first, self.num_parts)
        with tqdm(
            parts, "Quantizing", total=self.num_parts, initial=first, unit=" layers", disable=not self.show_progress
        ) as bar:
            for part in bar:
                states = self._one_part(part, states)
                give_memory_back()

    def _one_part(self, part: int, states: HiddenStates | None) -> HiddenStates | None:
        """Quantize a part and keep it; returns what the next one is given."""
        started = time.perf_counter()
        index = part if part < self.num_layers else None
        after = None
        if states is not None and part + 1 < self.num_parts:
            after = self._states(part + 1)
        module, view = self._load(index)
        inputs = None
        if states is not None:
            inputs = _Inputs(states, self.runner, index, self.batches, self.device)
        result = quantize_layer(view, inputs, quantizer_settings(self.request, dense_dtype(self.source.config)))
        if states is not None and after is not None:
            self._run_all(view, index, states, after)
            after.sync()
        unload(module)
        names = {own: full_name(view, own) for own in (*result.weights, *result.tensors)}
        self.state.keep(result, names)
        report = [replace(line, name=HEAD) if index is None else line for line in result.report]
        self.state.count(report, time.perf_counter() - started)
        self.observer.finished(part, self.num_parts, report, self.state.seconds)
        if states is not None:
            states.remove()
        return after

    def _load(self, index: int | None) -> tuple[nn.Module, LayerView]:
        skeleton = self.opened.skeleton
        if index is None:
            head = load_head(skeleton, self.source, self.device, tied=self.opened.tied)
            return head, view_head(head)
        module = load_layer(skeleton, self.source, index, self.device)
        return module, view_layer(skeleton, module, index, self.request.skip_pattern)

    def _run_all(self, view: LayerView, index: int | None, inputs: HiddenStates, outputs: HiddenStates) -> None:
        for place, batch in enumerate(self.batches):
            values = self.runner.run(index, view.module, inputs.read(place).to(self.device))
            self._require_finite(values, batch, f"{view.name}, as quantized,")
            outputs.write(place, values)

    def _embed(self, states: HiddenStates) -> None:
        config = self.opened.skeleton.config
        name = f"{EMBEDDING}.weight"
        table = self.source.read_tensor(TensorSlot(name, (config.vocab_size, config.hidden_size)))
        for index, batch in enumerate(self.batches):
            values = table[batch.ids].float()
            self._require_finite(values, batch, name)
            states.write(index, values)

    def _require_finite(self, values: torch.Tensor, batch: _Batch, where: str) -> None:
        finite = values.isfinite().flatten(1).all(dim=1)
        if bool(finite.all()):
            return
        row = int((~finite).nonzero()[0])
        ids = batch.ids[row]
        raise QuantizationError(
            f"{where} gives NaN or infinity for calibration sample {batch.numbers[row]} ({len(ids)} tokens, beginning "
            f"with {ids[:8].tolist()}); nothing was written. Check the model with qengine generate, or leave that "
            "sample out"
        )

    def _states(self, part: int) -> HiddenStates:
        """What a part is given, in a file of its own."""
        sizes = [batch.size for batch in self.batches]
        path = self.state.folder / f"hidden-{part:05d}.bin"
        return HiddenStates(path, sizes, self.opened.skeleton.config.hidden_size)


# After


def _producer(request: QuantRequest, samples: CalibrationSet | None, name: str) -> Producer:
    details: dict[str, Any] = {}
    if samples is not None:
        details = {
            "calibration": samples.name,
            "calibration_samples": len(samples.samples),
            "calibration_tokens": samples.num_tokens,
            "calibration_sha256": samples.sha256,
        }
    return Producer(PROJECT_VERSION, name, request.method, details)


def _assemble(
    folder: OutputFolder, run: _Run, producer: Producer, path: Path, shard_bytes: int, asked: dict[str, Any]
) -> QuantReport:
    """Put the finished parts and what was not touched into one checkpoint."""
    opened, source, request = run.opened, run.source, run.request
    parts = [run.state.read(part) for part in range(run.num_parts)]
    records = {name: part for part in parts for name in part.records}
    has_order = (
        any(part.record(name).perm is not None for name, part in records.items()) if request.act_order else False
    )
    scheme = export_scheme(request, has_order=has_order)
    shards = ShardWriter(folder, shard_bytes, producer.header())
    # What was absorbed is of the type that quantizers were told; the rest keeps its own, but for expanded tables.
    kept = dense_dtype(source.config) if source.quantization == "gguf" else None
    tied = opened.tied and not request.lm_head
    dense: list[str] = []
    for section, slots in enumerate(opened.skeleton.sections(tied=tied)):
        for slot in slots:
            part = records.get(slot.name)
            if isinstance(slot, LinearSlot) and part is not None:
                shards.add(linear_tensors(slot.name, part.record(slot.name), scheme, kept))
                continue
            owners = parts if section > run.num_layers else parts[section - 1 : section] if section else []
            shards.add(_untouched(source, slot, owners, kept))
            dense += [slot.name] if isinstance(slot, LinearSlot) else []
    shards.finish()
    config = opened.skeleton.exported_config(source.config, source.path)
    if opened.tied and not tied:
        config["tie_word_embeddings"] = False
    quantization = quantization_config(scheme, dense, producer, head_is_quantized=request.lm_head)
    write_configs(folder, config, quantization)
    write_companions(folder, source, path)
    report = QuantReport(asked, shards.num_bytes, tuple(run.state.report))
    report.write(folder)
    folder.write_text(CARD, model_card(producer, scheme, shards.num_bytes))
    folder.finish(producer.entries())
    return report


def _untouched(
    source: WeightSource, slot: LinearSlot | TensorSlot, owners: Sequence[FinishedPart], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """The tensors of a slot that was not quantized, but may have absorbed a factor."""
    if isinstance(slot, TensorSlot):
        changed = next((tensor for part in owners if (tensor := part.changed(slot.name)) is not None), None)
        if changed is not None:
            return {slot.name: changed}
        return {slot.name: cast(slot.name, source.read_tensor(slot), dtype)}
    weight = source.read_linear(slot)
    if isinstance(weight, PackedWeight):
        dtype = dense_dtype(source.config)
    return linear_tensors(slot.name, weight, None, dtype)


# The script


class _Plan(Observer):
    """Says beforehand what it will take."""

    def __init__(self, title: str) -> None:
        self._title = title

    def begins(self, preview: Preview) -> None:
        sys.stdout.write("\n".join(plan_lines(self._title, preview)) + "\n")
        sys.stdout.flush()


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m converters.quantize`: the same without the engine, and so without what needs one. Returns the exit
    code."""
    parser = argparse.ArgumentParser(
        "python -m converters.quantize",
        description="Quantize a model, layer by layer: qengine quantize without the engine, which "
        "knows hub ids, the bundled model and --evaluate besides.",
    )
    parser.add_argument("model", help="a folder of safetensors, or a .gguf file")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--method", default="gptq", choices=("awq", "gptq", "rtn", "auto"))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    symmetry = parser.add_mutually_exclusive_group()
    symmetry.add_argument("--sym", action="store_true", default=None, help="the zero point is the middle of the range")
    symmetry.add_argument("--asym", dest="sym", action="store_false", help="each group has a zero point")
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--format", choices=FORMATS)
    parser.add_argument("--calibration", default="builtin", help="builtin, FILE.txt, FILE.jsonl or a hub id")
    parser.add_argument("--num-samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--skip", metavar="REGEX")
    parser.add_argument("--lm-head", action="store_true")
    try:
        asked = vars(parser.parse_args(argv))
        title = _Plan(f"{model_name(Path(asked['model']))} -> {asked['out']}")
        done = quantize(**asked, observer=title, show_progress=sys.stderr.isatty())
    except (CheckpointError, QuantizationError, WriteError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2 if isinstance(error, CheckpointError) else 1
    except KeyboardInterrupt:
        sys.stderr.write("stopped; --resume goes on with the finished layers\n")
        return 130
    sys.stdout.write("\n".join(result_lines(done)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
