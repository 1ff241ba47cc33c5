"""What will run, and why it may be slow: one record per distinct linear of a model, and what a decode step reads.

`inspect_model` answers from headers and one sample of every kind of linear; `summarize` makes the same records of
linears that are loaded, for the log. Invariant: both are made from `MergedPlan`s by the same code, so they cannot
contradict each other. Times are bounds that follow from bytes and bandwidth; nothing is measured or run here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qengine.config import ModelConfig
from qengine.layers.linear import Linear, MergedPlan, plan_linear
from qengine.models.shapes import MergedShape, all_merged_linears
from qengine.runtime.loader import OpenedModel, linear_kind, sketch_linear
from quant_kernels.attention.kv_format import INT8, KVFormat, plain
from quant_kernels.late import try_import
from quant_kernels.linear.dispatch import Target
from quant_kernels.linear.plan import LinearPlan, launch
from quant_kernels.packing import fold_input_order
from quant_kernels.tuning.select import EXPAND, Choice, Selector

logger = logging.getLogger(__name__)

GATE_UP = "gate_up"
#: What the parts of a linear are called where they run one by one.
_PARTS: Mapping[str, tuple[str, ...]] = {"qkv": ("q", "k", "v"), GATE_UP: ("gate", "up")}


@dataclass(frozen=True, slots=True)
class LinearSummary:
    """Linears that run alike, one in each of `num_layers` layers.

    Attributes:
        name: "qkv", "o", "gate_up", "down" or "head"; "qkv.k" for a part that runs on its own.
        in_features, out_features: K and N.
        format: as the file has it, as `LinearPlan` says it, e.g. "w4 g128".
        kernel: what runs in a decode step, e.g. "cpu_int4", or "matmul" of the Triton kernels.
        configuration: its tile and its split of K, e.g. "16x128 r32 w4 s4 /4"; None for kernels without.
        split_k: shares of K.
        reason: why this kernel and this configuration.
        num_bytes: read in one step, all layers together.
        issue_share: part of the card's issue slots taken at full memory bandwidth; None if not known.
        is_expanded: quantized in the file, dense in memory; `reason` says why.
        slow: what makes it slower than it could be, in words.
        notes: what else is worth knowing.
    """

    name: str
    num_layers: int
    in_features: int
    out_features: int
    format: str
    kernel: str
    configuration: str | None
    split_k: int | None
    reason: str
    num_bytes: int
    issue_share: float | None
    is_expanded: bool
    slow: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def is_slow(self) -> bool:
        """Whether something about it is slower than it could be."""
        return self.is_expanded or bool(self.slow)

    @property
    def kernel_text(self) -> str:
        """The kernel with its configuration."""
        return self.kernel if self.configuration is None else f"{self.kernel} {self.configuration}"

    @property
    def text(self) -> str:
        """Everything in one line, for the log."""
        what = f"{self.name} x{self.num_layers}"
        size = f"{self.in_features:5d} -> {self.out_features:6d}"
        head = f"linear {what:<11} {size}  {self.format}: {self.kernel_text}, {self.num_bytes / 1e6:.1f} MB a step"
        return "; ".join((head, self.reason, *self.slow, *self.notes))


@dataclass(frozen=True, slots=True)
class CacheCost:
    """What a KV cache of one dtype adds to a step.

    Attributes:
        dtype: of the cache, as `--kv-cache-dtype` takes it.
        bytes_per_token: of context, all layers together, scales included.
        equal_context: tokens of context per sequence at which a step reads as much cache as weights; None where
            sliding windows keep it below that for ever.
    """

    dtype: str
    bytes_per_token: int
    equal_context: int | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """A model on a device, as it would run a decode step of `num_sequences` sequences.

    Attributes:
        device: the card's name, or "cpu".
        bytes_per_s: memory bandwidth; None if not known.
        linears: in order of execution.
        cache: by dtype.
    """

    model: str
    architecture: str
    description: str
    dtype: str
    device: str
    num_layers: int
    num_sequences: int
    bytes_per_s: float | None
    linears: tuple[LinearSummary, ...]
    cache: tuple[CacheCost, ...]

    @property
    def num_bytes(self) -> int:
        """Read by all linears in one step."""
        return sum(linear.num_bytes for linear in self.linears)

    @property
    def seconds(self) -> float | None:
        """What a step takes at least: its bytes at the memory's bandwidth."""
        return self.seconds_for(self.num_bytes)

    @property
    def tokens_per_s(self) -> float | None:
        """What all sequences together get at most."""
        return None if self.seconds is None else self.num_sequences / self.seconds

    def seconds_for(self, num_bytes: int) -> float | None:
        """How long the memory takes for so many bytes."""
        return None if self.bytes_per_s is None else num_bytes / self.bytes_per_s


def inspect_model(
    opened: OpenedModel, target: Target, *, num_sequences: int = 1, bytes_per_s: float | None = None
) -> Inspection:
    """What the model would run as on a target, which need not be there.

    Of the weights it reads one sample of every kind of linear that is quantized, and supposes that the others of its
    kind are like it where headers do not tell (whether zero points are all the same, say).

    Args:
        num_sequences: in the decode step.
        bytes_per_s: memory bandwidth; None if not known.

    Raises:
        LoadError: if a sample's data is bad.
    """
    linears = summarize(_plans(opened, target), target.selector, num_sequences)
    weight_bytes = sum(linear.num_bytes for linear in linears)
    dtype = str(target.dtype).removeprefix("torch.")
    formats = (plain(target.dtype), INT8)
    return Inspection(
        model=opened.location.name,
        architecture=opened.config.architecture,
        description=opened.source.description,
        dtype=dtype,
        device=target.device.type if target.selector is None else target.selector.card.name,
        num_layers=opened.config.num_layers,
        num_sequences=num_sequences,
        bytes_per_s=bytes_per_s,
        linears=tuple(linears),
        cache=tuple(_cache_cost(opened.config, one, weight_bytes / num_sequences) for one in formats),
    )


def summarize_loaded(linears: Iterable[Linear]) -> list[LinearSummary]:
    """The same records of linears in memory, for a step of one sequence."""
    loaded = list(linears)
    selector = loaded[0].target.selector if loaded else None
    return summarize(((linear.plan, 1) for linear in loaded), selector, 1)


def log_linears(linears: Iterable[Linear]) -> None:
    """Log one line per distinct linear shape as `qengine inspect` shows it: nothing slow is used in silence."""
    for summary in summarize_loaded(linears):
        logger.info("%s", summary.text)


def summarize(
    plans: Iterable[tuple[MergedPlan, int]], selector: Selector | None, num_sequences: int
) -> list[LinearSummary]:
    """One record per distinct linear, or per part of one that does not fuse.

    Args:
        plans: each with the number of layers that have it.
        selector: of the card; None on a CPU.
        num_sequences: rows of a decode step.
    """
    counts: dict[tuple[str, MergedPlan], int] = {}
    for merged, count in plans:
        role = _role(merged.name)
        key = (role, MergedPlan(role, merged.plans, merged.why_separate, merged.order_is_folded))
        counts[key] = counts.get(key, 0) + count
    return [
        _summary(part, planned, merged, count, selector, num_sequences)
        for (role, merged), count in counts.items()
        for part, planned in zip(_part_names(role, len(merged.plans)), merged.plans, strict=True)
    ]


def _role(name: str) -> str:
    """ "model.layers.0.self_attn.qkv_proj" is "qkv", "lm_head" is "head"."""
    return name.rpartition(".")[2].removesuffix("_proj").removeprefix("lm_")


def _part_names(role: str, num_parts: int) -> list[str]:
    return [role] if num_parts == 1 else [f"{role}.{part}" for part in _PARTS[role]]


def _plans(opened: OpenedModel, target: Target) -> Iterator[tuple[MergedPlan, int]]:
    """The plan of one linear of every kind, with how many there are of it."""
    groups: dict[tuple[object, ...], list[MergedShape]] = {}
    for shape in all_merged_linears(opened.config, tied=opened.tied):
        kinds = ((part.in_features, part.out_features, linear_kind(opened, part)) for part in shape.parts)
        groups.setdefault((_role(shape.name), *kinds), []).append(shape)
    for shapes in groups.values():
        yield _plan_sample(opened, shapes[0], target), len(shapes)


def _plan_sample(opened: OpenedModel, shape: MergedShape, target: Target) -> MergedPlan:
    parts = [sketch_linear(opened, part) for part in shape.parts]
    if not shape.folds_order:
        return plan_linear(shape.name, parts, target)
    folded, _ = fold_input_order(parts[0], [])
    return plan_linear(shape.name, [folded], target, order_is_folded=folded is not parts[0])


def _summary(
    name: str, planned: LinearPlan, merged: MergedPlan, count: int, selector: Selector | None, num_sequences: int
) -> LinearSummary:
    choice = launch(planned, selector, num_sequences, is_gate_up=name == GATE_UP)
    share = _issue_share(planned, choice, selector)
    return LinearSummary(
        name=name,
        num_layers=count,
        in_features=planned.in_features,
        out_features=planned.out_features,
        format=planned.format,
        kernel=planned.kernel if choice is None else choice.kernel,
        configuration=None if choice is None or choice.tile is None else _configuration(choice),
        split_k=None if choice is None else choice.split_k,
        reason=planned.reason if choice is None else f"{planned.reason}; {choice.reason}",
        num_bytes=planned.bytes_per_pass * count,
        issue_share=share,
        is_expanded=planned.is_expanded,
        slow=tuple(_slow(planned, merged, share, selector)),
        notes=tuple(_notes(planned, merged, choice)),
    )


def _configuration(choice: Choice) -> str:
    assert choice.tile is not None, "only expanding has no tile"
    return choice.tile.name + (f" /{choice.split_k}" if choice.split_k > 1 else "")


def _slow(planned: LinearPlan, merged: MergedPlan, share: float | None, selector: Selector | None) -> Iterator[str]:
    if merged.why_separate:
        yield f"{len(merged.plans)} launches instead of one: {merged.why_separate}"
    if planned.gathers and not _order_is_free(planned, merged):
        yield "activation order: gathers its input in every step"
    if share is not None and share > 1:
        yield f"instructions, not memory, would be the limit: {share:.2f} times the card's issue slots"
    if planned.scheme is not None and selector is not None and selector.twin:
        yield "plain Triton, because the assembly gave wrong results here"


def _order_is_free(planned: LinearPlan, merged: MergedPlan) -> bool:
    """Whether the operation before stores its columns where this linear wants them: Triton's do, in a layer."""
    return planned.scheme is not None and not merged.why_separate and _role(merged.name) != "head"


def _notes(planned: LinearPlan, merged: MergedPlan, choice: Choice | None) -> Iterator[str]:
    if planned.gathers and _order_is_free(planned, merged):
        yield "activation order: the operation before stores its columns in that order, which costs nothing"
    if merged.order_is_folded:
        yield "activation order folded into gate and up, where it costs nothing"
    if choice is not None and choice.kernel == EXPAND:
        yield "expanded in every step, since so many rows are bound by arithmetic and not by memory"


def _issue_share(planned: LinearPlan, choice: Choice | None, selector: Selector | None) -> float | None:
    prediction = None if choice is None else try_import("quant_kernels.compiled.prediction")
    if prediction is None or selector is None:
        return None
    share: float | None = prediction.predicted_issue_share(
        choice, planned.scheme, selector.card, planned.bytes_per_weight
    )
    return share


def _cache_cost(config: ModelConfig, kv_format: KVFormat, weight_bytes: float) -> CacheCost:
    """`weight_bytes` are those that one sequence of the step has to bear."""
    per_token = config.num_layers * kv_format.bytes_per_token(config.num_kv_heads, config.head_dim)
    windows = config.windows or (None,) * config.num_layers
    return CacheCost(kv_format.name, per_token, _equal_context(weight_bytes * config.num_layers / per_token, windows))


def _equal_context(layer_tokens: float, windows: Sequence[int | None]) -> int | None:
    """The context at which all layers together read `layer_tokens`; a layer with a window reads no more than that."""
    left = layer_tokens
    limits = sorted(window for window in windows if window is not None)
    for done, window in enumerate(limits):
        growing = len(windows) - done
        if window * growing >= left:
            return int(left / growing)
        left -= window
    growing = len(windows) - len(limits)
    return int(left / growing) if growing else None
