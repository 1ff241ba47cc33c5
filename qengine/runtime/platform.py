"""Platform: the device a model runs on, and all that depends on which one it is.

Tests make one with Triton's interpreter in place of a GPU. Invariant: what a device cannot do is refused here, before
weights are read. Triton's side is imported only where it is used, since systems without it run on the CPU.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from qengine.config import EngineConfig, ModelConfig
from qengine.errors import ConfigError, LoadError
from qengine.models.decoder import Decoder
from qengine.runtime import gpu_memory
from qengine.runtime.inputs import CpuSteps, StackSteps, Steps
from qengine.runtime.kv_cache import KVCache
from qengine.runtime.links import Links
from qengine.runtime.machine_memory import CPU, available_memory, driver_cards
from qengine.runtime.model_bytes import ModelFacts
from qengine.runtime.opening import OpenedHeaders
from qengine.runtime.planner import (
    Card,
    Loaded,
    Machine,
    MemoryPlan,
    allowed_bytes,
    check_gpu,
    compute_dtype,
    wanted_length,
)
from qengine.runtime.planning import plan_to_start
from qengine.runtime.runner import ModelRunner
from qengine.runtime.sampler import make_sampler
from quant_kernels.attention.kv_format import KV_FORMATS, KVFormat, plain
from quant_kernels.footprint import Kernels
from quant_kernels.late import try_import
from quant_kernels.linear.dispatch import MIN_ARCH, Target

if TYPE_CHECKING:
    from qengine.runtime.graphs import Recorder

logger = logging.getLogger(__name__)

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class Platform:
    """Where a model runs.

    Attributes:
        target: device, dtype, and which kernels to launch.
        recorder: records decode steps; None to launch every step.
    """

    target: Target
    recorder: Recorder | None = None

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype, *, enforce_eager: bool) -> Platform:
        """The platform of a device.

        Raises:
            LoadError: if its kernels cannot run.
        """
        try:
            target = Target.of(device, dtype)
        except (ValueError, RuntimeError) as error:
            raise LoadError(f"the kernels cannot run on {device}: {error}") from error
        if device.type != "cuda" or enforce_eager:
            return cls(target)
        module = try_import("qengine.runtime.graphs")
        assert module is not None, "choose_device has looked for triton"
        return cls(target, module.CudaRecorder())

    @property
    def device(self) -> torch.device:
        return self.target.device

    def kv_format(self, name: str) -> KVFormat:
        """The KV cache's format by the user's name for it; "auto" keeps the compute dtype."""
        return plain(self.target.dtype) if name == "auto" else KV_FORMATS[name]

    def check(self, model: ModelConfig, config: EngineConfig) -> None:
        """Refuse what the device's kernels do not know.

        Raises:
            ConfigError: naming the option or the model's property.
        """
        wanted_length(model, config.scheduler.max_model_len)
        selector = self.target.selector
        if selector is None:
            return
        check_gpu(model, config, selector.card.arch)
        if self.device.type == "cuda" and config.cache.kv_cache_dtype == "float32":
            raise ConfigError("kv_cache_dtype is float32, which is for CPUs; use auto, float16, bfloat16, int8 or fp8")

    @property
    def machine(self) -> Machine:
        """What the planner works with: the device as it is now."""
        kernels: Kernels = "gpu" if self.target.selector is not None else "native" if self.target.native else "cpu"
        is_cuda = self.device.type == "cuda"
        card = gpu_memory.card_of(self.device) if is_cuda else Card(CPU, available_memory())
        dtype = str(self.target.dtype).removeprefix("torch.")
        return Machine(
            kernels,
            (card,),
            dtype,
            has_graphs=self.recorder is not None,
            is_interpreted=kernels == "gpu" and not is_cuda,
        )

    def plan(
        self,
        opened: OpenedHeaders,
        config: EngineConfig,
        *,
        measured_weights: int | None = None,
        machine: Machine | None = None,
    ) -> MemoryPlan:
        """Where all bytes go, from headers alone; holds torch to what the user allows of a GPU.

        Args:
            measured_weights: bytes of the weights where they are loaded already.
            machine: as it was before they were: what a CPU's memory has free does not tell what the weights took.
                None for as it is now.

        Raises:
            ConfigError: if the request contradicts the model or the device.
            DoesNotFitError: if it needs more memory than there is, with the table.
        """
        loaded = None if measured_weights is None else Loaded((measured_weights,))
        plan = plan_to_start(ModelFacts.of(opened), config, machine or self.machine, loaded=loaded)
        self.cap_memory(config)
        return plan

    def cap_memory(self, config: EngineConfig, rank: int = 0) -> None:
        """Hold torch to what the user allows a rank of its GPU.

        Raises:
            ConfigError: if that is more than the card has.
        """
        if self.device.type == "cuda":
            gpu_memory.cap_process(allowed_bytes(gpu_memory.card_of(self.device), config, rank), self.device)

    def machine_of_ranks(self, num_ranks: int) -> Machine:
        """The same for several ranks: a card each, as the driver tells of them; on a CPU they share its memory.

        Raises:
            ConfigError: if there are fewer cards.
        """
        if self.device.type != "cuda":
            return replace(self.machine, cards=self.machine.cards * num_ranks)
        cards = driver_cards()
        if num_ranks > len(cards):
            raise ConfigError(
                f"tensor_parallel_size times pipeline_parallel_size is {num_ranks}, but there are {len(cards)} GPU(s), "
                "and each rank needs one; lower them or use --device cpu"
            )
        return replace(self.machine, cards=cards[:num_ranks])

    def make_runner(
        self, model: Decoder, cache: KVCache, plan: MemoryPlan, max_num_seqs: int, links: Links | None = None
    ) -> ModelRunner:
        """The runner of a loaded model, or of this rank's part of one."""
        selector = self.target.selector
        sampler = make_sampler(on_triton=selector is not None)
        if selector is None:
            stacked = model.stack is not None and cache.format == plain(torch.bfloat16)
            by_layer = CpuSteps(model.rope, cache, model.dtype)
            steps: Steps = StackSteps(by_layer) if stacked else by_layer
            return ModelRunner(model, cache, steps, sampler, links=links)
        inputs, graphs = try_import("qengine.runtime.device_inputs"), try_import("qengine.runtime.graphs")
        assert inputs is not None and graphs is not None, "choose_device has looked for triton"  # noqa: PT018
        queued = inputs.DeviceSteps(
            model.config, model.rope, cache.format, cache.block_size, selector.card, self.device
        )
        if self.recorder is None:
            return ModelRunner(model, cache, queued, sampler, links=links)
        max_blocks = -(-plan.max_model_len // cache.block_size)
        recorded = graphs.DecodeGraphs(model, cache, queued, self.recorder, max_num_seqs, max_blocks)
        return ModelRunner(model, cache, queued, sampler, recorded, links=links)


def choose_device(name: str) -> torch.device:
    """The device to run on; "auto" is the first GPU that the kernels can use, else the CPU.

    Raises:
        ConfigError: if a GPU is asked for and none can be used, with the reason.
    """
    if name == "cpu":
        return torch.device("cpu")
    reason = _why_no_gpu()
    if reason is None:
        return torch.device("cuda", torch.cuda.current_device())
    if name == "cuda":
        raise ConfigError(f"device is 'cuda', but {reason}; or use --device cpu")
    if torch.cuda.is_available():
        logger.warning("running on the CPU although there is a GPU: %s", reason)
    return torch.device("cpu")


def rank_device(device: torch.device, rank: int) -> torch.device:
    """The device of one of several ranks like `device`, made current: a GPU of its own."""
    if device.type != "cuda":
        return device
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _why_no_gpu() -> str | None:
    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else ", and this torch is built without CUDA; see https://pytorch.org"
        return f"torch sees no CUDA GPU{built}"
    major, minor = torch.cuda.get_device_capability()
    if major * 10 + minor < MIN_ARCH:
        return f"{torch.cuda.get_device_name()} is sm_{major}{minor}, and the kernels need sm_{MIN_ARCH} or newer"
    if try_import("triton") is None:
        return "triton is not installed; run: pip install triton"
    return None


def choose_dtype(name: str, device: torch.device, stored: str | None = None) -> torch.dtype:
    """The compute dtype; see `planner.compute_dtype`.

    Raises:
        ConfigError: for a dtype that the device has no kernels for.
    """
    if name == "float16" and device.type == "cpu":
        logger.warning("dtype float16 has no 4-bit kernel on the CPU: weights are expanded at load and run slowly")
    return _DTYPES[compute_dtype(name, stored, on_gpu=device.type == "cuda")]
