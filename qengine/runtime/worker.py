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
from dataclasses import replace

from qengine.config import EngineConfig
from qengine.errors import EngineDeadError
from qengine.models.decoder import Decoder
from qengine.runtime.checkpoint_check import examine, judge
from qengine.runtime.inspection import log_linears
from qengine.runtime.kv_cache import KVCache
from qengine.runtime.links import Links
from qengine.runtime.loader import LoadTimes, OpenedModel, load_timed
from qengine.runtime.planner import MemoryPlan, size_text
from qengine.runtime.platform import Platform
from qengine.runtime.runner import ModelRunner, PendingStep
from qengine.runtime.warm_up import run_decode_step, run_worst_step
from qengine.scheduling.batch import Batch, StepResult

logger = logging.getLogger(__name__)


class Worker:
    """One rank on one device.

    Args:
        plan: of all ranks, where there are several; None makes this one's.
        links: to the other ranks; None if there are none.
        rank: among all.

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
        *,
        rank: int = 0,
    ) -> None:
        self._platform = platform
        self._config = config
        self._opened = opened
        self._links = links or Links()
        self._kv_format = platform.kv_format(config.cache.kv_cache_dtype)
        self._model: Decoder | None = None
        self._runner: ModelRunner | None = None
        platform.check(opened.config, config)
        self._plan = plan or platform.plan(opened, config)
        if plan is not None:
            platform.cap_memory(config, rank)

    def load(self, *, show_progress: bool = False) -> LoadTimes:
        """Read this rank's weights; returns what that took.

        Raises:
            LoadError: the data itself is bad.
        """
        self._model, times = load_timed(
            self._opened,
            self._platform.target,
            self._plan.max_model_len,
            group=self._links.group,
            layers=self._links.layers,
            show_progress=show_progress,
        )
        return times

    def log_kernels(self) -> None:
        """Say what this rank's linears run on."""
        log_linears(self._loaded().linears())

    @property
    def weight_bytes(self) -> int:
        """Of all weights that were loaded."""
        return self._loaded().num_bytes

    def plan(self) -> MemoryPlan:
        """What a model in one process is given beside its weights, which must be in their place.

        Headers may have told of less than there was; then it is planned again.

        Raises:
            DoesNotFitError: too little is left.
        """
        planned, found = self._plan.cards[0].weight_bytes, self.weight_bytes
        if found <= planned:
            return self._plan
        logger.warning("the weights take %s, and headers told of %s", size_text(found), size_text(planned))
        plan = self._platform.plan(self._opened, self._config, measured_weights=found)
        return replace(plan, max_model_len=min(plan.max_model_len, self._plan.max_model_len))

    def allocate(self, plan: MemoryPlan) -> None:
        """Make the KV cache. `plan` is the same for all ranks."""
        model, device = self._loaded(), self._platform.device
        cache = KVCache(model.config, plan.num_blocks, plan.block_size, self._kv_format, device)
        self._runner = self._platform.make_runner(model, cache, plan, self._config.scheduler.max_num_seqs, self._links)

    def warm_up(self, plan: MemoryPlan) -> None:
        """Let the model run for the first time: look whether it computes numbers, unless the user wants no check.

        On a GPU the largest step follows, so that its allocator holds what steps take.

        Raises:
            LoadError: naming the layer that computes none.
        """
        if not self._config.load.skip_check:
            self._check_weights(plan)
        if self._platform.device.type == "cuda":
            run_worst_step(self.runner, plan)

    def record_graph(self) -> bool:
        """Record the decode step of one sequence, which the first answer needs; larger ones are recorded when met.

        False where steps are not recorded.
        """
        if self._platform.recorder is None:
            return False
        run_decode_step(self.runner)
        return True

    def _check_weights(self, plan: MemoryPlan) -> None:
        longest, most = plan.max_model_len, plan.max_num_batched_tokens
        found = examine(self.runner, max_len=longest, max_rows=min(most, self._config.scheduler.max_num_seqs * longest))
        # Of several ranks one says it for all.
        if self._config.load.load_format == "dummy" or not self._links.samples:
            found = replace(found, constant_token_id=None)
        judge(found, self._opened.location.name, self.runner.model.dtype, self._opened.config.torch_dtype)

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
