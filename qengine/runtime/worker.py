"""Worker: all that one rank of a model does, whether it is the only one, in this process, or one of several.

    worker = Worker(platform, config, opened)
    worker.load(); worker.allocate(worker.plan())       # once
    worker.step(batch)                                  # again and again
    worker.shutdown()

Invariant: the ranks of a model make the same calls in the same order. What the device cannot do is refused before
weights are read. It knows neither how it is called from elsewhere nor what becomes of its answers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from qengine.config import EngineConfig
from qengine.errors import EngineDeadError
from qengine.models.decoder import Decoder
from qengine.runtime.inspection import summarize_loaded
from qengine.runtime.kv_cache import KVCache
from qengine.runtime.links import Links
from qengine.runtime.loader import OpenedModel, load_decoder
from qengine.runtime.planner import MemoryPlan, wanted_length
from qengine.runtime.platform import Platform
from qengine.runtime.runner import ModelRunner, PendingStep
from qengine.scheduling.batch import Batch, StepResult

logger = logging.getLogger(__name__)


def plan_ahead(platform: Platform, config: EngineConfig, opened: OpenedModel) -> MemoryPlan | None:
    """The plan where it is known before weights are loaded: a CPU's share. A GPU's cache takes what weights leave.

    Raises:
        ConfigError: what was asked for does not fit.
    """
    if platform.device.type == "cuda":
        return None
    return platform.plan(opened.config, config, platform.kv_format(config.cache.kv_cache_dtype))


class Worker:
    """One rank on one device.

    Args:
        plan: the machine's, where several ranks share its memory and it is known.
        links: to the other ranks; None if there are none.

    Raises:
        ConfigError: the device cannot run the model as it is configured.
    """

    def __init__(
        self,
        platform: Platform,
        config: EngineConfig,
        opened: OpenedModel,
        plan: MemoryPlan | None = None,
        links: Links | None = None,
    ) -> None:
        self._platform = platform
        self._config = config
        self._opened = opened
        self._links = links or Links()
        self._kv_format = platform.kv_format(config.cache.kv_cache_dtype)
        platform.check(opened.config, config)
        platform.cap_memory(config)
        self._plan = plan or plan_ahead(platform, config, opened)
        self._model: Decoder | None = None
        self._runner: ModelRunner | None = None

    def load(self, *, show_progress: bool = False) -> None:
        """Read this rank's weights.

        Raises:
            LoadError: the data itself is bad.
        """
        asked = self._config.scheduler.max_model_len
        longest = wanted_length(self._opened.config, asked) if self._plan is None else self._plan.max_model_len
        self._model = load_decoder(
            self._opened,
            self._platform.target,
            longest,
            group=self._links.group,
            layers=self._links.layers,
            show_progress=show_progress,
        )

    def log_kernels(self) -> None:
        """One line per distinct linear shape as `qengine inspect` shows it: nothing slow is used in silence."""
        for summary in summarize_loaded(self._loaded().linears()):
            logger.info("%s", summary.text)

    @property
    def weight_bytes(self) -> int:
        """Of all weights that were loaded."""
        return self._loaded().num_bytes

    def plan(self) -> MemoryPlan:
        """What this rank can hold beside its weights, which on a GPU must be in their place.

        Raises:
            ConfigError: what was asked for does not fit.
        """
        return self._plan or self._platform.plan(self._loaded().config, self._config, self._kv_format)

    def allocate(self, plan: MemoryPlan) -> None:
        """Make the KV cache. `plan` is the same for all ranks."""
        model, device = self._loaded(), self._platform.device
        cache = KVCache(model.config, plan.num_blocks, plan.block_size, self._kv_format, device)
        self._runner = self._platform.make_runner(model, cache, plan, self._config.scheduler.max_num_seqs, self._links)

    @property
    def runner(self) -> ModelRunner:
        """The runner.

        Raises:
            EngineDeadError: after shutdown.
        """
        if self._runner is None:
            raise EngineDeadError("the model has been released; start a new engine")
        return self._runner

    def begin(self, batch: Batch) -> PendingStep:
        """Queue a step. The next one may be queued only after this one is finished."""
        return self.runner.begin(batch)

    def step(self, batch: Batch) -> StepResult:
        """Run one step to its end."""
        return self.begin(batch).finish()

    def clear_not_finite(self, block_ids: Sequence[int]) -> None:
        """Zero those of the blocks that hold NaN or infinity, which a sequence that failed may have left."""
        self.runner.cache.clear_not_finite(block_ids)

    def check(self) -> None:
        """Raises EngineDeadError if a step could not be run."""
        assert self.runner.model is self._model

    def shutdown(self) -> None:
        """Let go of the model, the cache and the other ranks. Idempotent."""
        self._runner = self._model = None
        self._links.close()

    def _loaded(self) -> Decoder:
        if self._model is None:
            raise EngineDeadError("the model is not loaded; start a new engine")
        return self._model
