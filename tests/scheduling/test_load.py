"""Heavy traffic: thousands of requests that come at random moments and of which only the simulation knows the length.

Measured over the steps in which somebody waits, from the first time the pool is nine tenths full to the last arrival:
the share of blocks that are referenced by a request (allocated; neither cached nor merely promised). Over the whole
run: recomputed tokens as a share of all computed ones, with the prefix cache off, so nothing preempted is found again.
Waiting is compared with the work that was ahead, in blocks times steps, had the pool done it at 100 %.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from qengine.request import Request
from qengine.scheduling.batch import Batch, SampledToken, StepResult
from qengine.scheduling.block_pool import BlockPool
from qengine.scheduling.scheduler import Scheduler, SchedulerLimits
from tests.scheduling.fake_runner import make_request

NUM_BLOCKS, BLOCK_SIZE = 1600, 16
MAX_TOKENS = 1024
END, GO_ON = 1, 0


def geometric(rng: random.Random, mean: float) -> int:
    return 1 + int(rng.expovariate(1 / mean))


def lognormal(rng: random.Random, mean: float) -> int:
    return 1 + int(rng.lognormvariate(math.log(mean) - 0.5, 1.0))


@dataclass
class Job:
    """A request, its true length, and when things happened to it (in steps)."""

    request: Request
    output_len: int
    arrival: int
    work_ahead: float
    token_steps: list[int] = field(default_factory=list)

    def work_left(self) -> float:
        """Blocks times steps until its end."""
        done = len(self.request.output_token_ids)
        mean_tokens = self.request.num_prompt_tokens + (done + self.output_len) / 2
        return (self.output_len - done) * (mean_tokens / BLOCK_SIZE + 0.5)


class Traffic:
    """Poisson arrivals at `load` times what the pool can serve, driven through a scheduler step by step."""

    def __init__(
        self, draw: Callable[[random.Random, float], int], prompt_len: float, output_len: float, load: float
    ) -> None:
        self._rng = random.Random(1)
        self._draw, self._prompt_len, self._output_len = draw, prompt_len, output_len
        self.pool = BlockPool(NUM_BLOCKS, BLOCK_SIZE)
        limits = SchedulerLimits(max_num_seqs=512, max_num_batched_tokens=2048, max_model_len=8192)
        self.scheduler = Scheduler(limits, self.pool, enable_prefix_caching=False)
        self.jobs: dict[str, Job] = {}
        self.unfinished: dict[str, Job] = {}
        self.usage: list[float] = []
        # Blocks times steps of a mean request; the mean of the squared output length is about twice the square.
        work = output_len * (prompt_len + output_len) / BLOCK_SIZE
        self._arrivals_per_step = load * NUM_BLOCKS / work

    def run(self, num_requests: int) -> None:
        step, next_arrival, loaded = 0, 0.0, False
        while len(self.jobs) < num_requests or self.scheduler.has_unfinished:
            while len(self.jobs) < num_requests and next_arrival <= step:
                self._arrive(step)
                next_arrival += self._rng.expovariate(self._arrivals_per_step)
            batch = self.scheduler.schedule()
            loaded = loaded or self.pool.usage >= 0.9
            if loaded and self.scheduler.num_waiting and len(self.jobs) < num_requests:
                self.usage.append(self.pool.usage)
            self._finish_step(batch, step)
            if step % 512 == 0:
                self.scheduler.check_integrity()
            step += 1

    def _arrive(self, step: int) -> None:
        prompt_len = min(self._draw(self._rng, self._prompt_len), 4000)
        request = make_request(f"r{len(self.jobs)}", [0] * prompt_len, max_tokens=MAX_TOKENS, eos=[END])
        output_len = min(self._draw(self._rng, self._output_len), MAX_TOKENS)
        ahead = sum(job.work_left() for job in self.unfinished.values())
        job = Job(request, output_len, step, ahead)
        self.jobs[request.request_id] = self.unfinished[request.request_id] = job
        self.scheduler.add(request)

    def _finish_step(self, batch: Batch, step: int) -> None:
        sampled = {}
        for entry in batch.entries:
            if entry.sample is not None:
                job = self.jobs[entry.request_id]
                job.token_steps.append(step)
                sampled[entry.request_id] = SampledToken(END if len(job.token_steps) == job.output_len else GO_ON)
        for request in self.scheduler.update(batch, StepResult(sampled)):
            if request.finished:
                del self.unfinished[request.request_id]


@pytest.mark.parametrize(
    ("draw", "prompt_len", "output_len"),
    [(geometric, 120, 200), (lognormal, 120, 200), (lognormal, 300, 100)],
    ids=["geometric", "lognormal", "long prompts"],
)
def test_a_full_pool_repeats_little_and_starves_nobody(
    draw: Callable[[random.Random, float], int], prompt_len: float, output_len: float
) -> None:
    traffic = Traffic(draw, prompt_len, output_len, load=1.3)
    traffic.run(1800)
    stats, jobs = traffic.scheduler.stats, list(traffic.jobs.values())

    assert len(traffic.usage) > 1000
    assert sum(traffic.usage) / len(traffic.usage) >= 0.95
    assert stats.num_recomputed_tokens < 0.05 * stats.num_scheduled_tokens
    useful = sum(job.request.num_tokens - 1 for job in jobs)
    assert stats.num_scheduled_tokens == useful + stats.num_recomputed_tokens

    assert stats.num_preemptions > 0, "the pool is never short: this measures nothing"
    assert max(job.request.num_preemptions for job in jobs) <= 2
    for job in jobs:
        assert len(job.request.output_token_ids) == job.output_len
        # First token: no later than the work ahead takes in a pool that is always full.
        waited = job.token_steps[0] - job.arrival
        assert waited <= job.work_ahead / NUM_BLOCKS + 10
        # From first to last token: its own length, and each preemption no longer than a fraction of the longest answer.
        stalled = job.token_steps[-1] - job.token_steps[0] + 1 - job.output_len
        assert stalled <= job.request.num_preemptions * MAX_TOKENS / 4
    assert traffic.pool.num_free == NUM_BLOCKS
