"""An engine that follows the engine contract without a model: its answers are scripted and its faults are ordered.

Every request is answered with the tokens of SCRIPT, over and over, one per step, or with the text that `answers` has
for words in its prompt. A prompt that contains one of the words below meets its fate instead. Grammars are compiled,
but nobody follows them. Only the engine's thread may call what the contract reserves for it; it is checked.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qengine.engine import EngineInfo
from qengine.errors import RequestError
from qengine.grammars.compiler import CompiledGrammar, GrammarCompiler
from qengine.grammars.sources import GrammarSource
from qengine.grammars.vocabulary import Vocabulary
from qengine.request import CompletionOutput, Logprob, Pooling, RequestOutput, RequestProgress, SamplingParams
from qengine.scheduling.records import SchedulerStats
from qengine.step_stats import EngineLoad, StepObserver
from qengine.tokenizer import IncrementalDetokenizer, load_tokenizer

FIXTURE = str(Path(__file__).parent.parent / "fixtures" / "llama-awq-g64")
SCRIPT = "The sky is blue, 天空 is 蓝色 and 🙂 is yellow. "
NAN_PROMPT = "make it NaN"
NEVER_FITS_PROMPT = "never fits"
DIE_PROMPT = "die now"
#: How often a held engine hears of new requests.
_LISTEN_SECONDS = 0.005


@dataclass
class _Choice:
    detokenizer: IncrementalDetokenizer
    script: list[int] | None = None
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | None = None


@dataclass
class ScriptedRequest:
    """What make_request gives: the public fields of a PendingRequest, and the script's state."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    cache_salt: str
    max_tokens: int
    choices: list[_Choice]
    embedding: list[float] | None = None
    num_computed_tokens: int = 0

    def contains(self, words: str) -> bool:
        return self.prompt is not None and words in self.prompt

    @property
    def finished(self) -> bool:
        return all(choice.finish_reason is not None for choice in self.choices)


class ScriptedEngine:
    """See the module.

    Attributes:
        num_permits: how many steps may still run; `hold` and `allow` make the engine as slow as a test needs.
        listens: a step that may not run ends without a token, instead of waiting until it may.
        aborted: ids in the order they were aborted.
        num_steps: steps so far.
        answers: words of a prompt -> the answer to it.
        grammars: what was compiled.
        num_prefill_tokens: of a prompt that one step computes; None: all, in the step of the first token.
    """

    def __init__(self, *, max_num_seqs: int = 8, max_model_len: int = 256) -> None:
        self.tokenizer = load_tokenizer(FIXTURE)
        self.info = EngineInfo(
            model="scripted",
            architecture="script",
            quantization=None,
            description="no weights",
            dtype="float32",
            device="cpu",
            max_model_len=max_model_len,
            vocab_size=self.tokenizer.vocab_size,
            hidden_size=4,
            block_size=16,
            num_blocks=1000,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=64,
            weight_bytes=0,
            kv_cache_bytes=0,
        )
        self.script = self.tokenizer.encode(SCRIPT, add_special_tokens=False)
        self._may_step = threading.Condition()
        self.num_permits = math.inf
        self.listens = False
        self.requests: dict[str, ScriptedRequest] = {}
        self.prepared: list[ScriptedRequest] = []
        self.aborted: list[str] = []
        self.num_steps = 0
        self.answers: dict[str, str] = {}
        self.grammars: list[GrammarSource] = []
        self._compiler = GrammarCompiler(self._vocabulary, seconds=60)
        self.is_shut_down = False
        self.observer: StepObserver | None = None
        self.on_scheduled: Callable[[], None] | None = None
        self.num_prefill_tokens: int | None = None
        self.totals = SchedulerStats()
        self._thread: int | None = None

    # Any thread

    def hold(self, *, listens: bool = False) -> None:
        """Stop before the next step, until `allow`; as in a step that hangs, unless the engine still `listens`."""
        with self._may_step:
            self.num_permits = 0
            self.listens = listens

    def allow(self, num_steps: float = math.inf) -> None:
        """Let that many steps run after `hold`."""
        with self._may_step:
            self.num_permits += num_steps
            self._may_step.notify()

    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self.tokenizer, self.info.vocab_size, self.tokenizer.eos_token_ids)

    def compile_grammar(self, source: GrammarSource) -> CompiledGrammar:
        compiled = self._compiler.compile(source)
        self.grammars.append(source)
        return compiled

    def make_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        cache_salt: str = "",
        add_special_tokens: bool = True,
        arrival_time: float | None = None,
        grammar: CompiledGrammar | None = None,
    ) -> ScriptedRequest:
        text = prompt if isinstance(prompt, str) else None
        ids = self.tokenizer.encode(prompt, add_special_tokens=False) if isinstance(prompt, str) else list(prompt)
        if len(ids) >= self.info.max_model_len:
            raise RequestError(f"the prompt has {len(ids)} tokens", param="prompt", code="context_length_exceeded")
        room = self.info.max_model_len - len(ids)
        answer = next((answer for words, answer in self.answers.items() if words in (text or "")), None)
        script = None if answer is None else self.tokenizer.encode(answer, add_special_tokens=False)
        choices = [
            _Choice(
                IncrementalDetokenizer(
                    self.tokenizer, stop=params.stop_strings, include_stop_str=params.include_stop_str_in_output
                ),
                script,
            )
            for _ in range(params.n)
        ]
        request = ScriptedRequest(
            request_id, text, ids, params, cache_salt, min(params.max_tokens or room, room), choices
        )
        self.prepared.append(request)
        return request

    def make_embedding_request(
        self,
        request_id: str,
        prompt: str | Sequence[int],
        *,
        pooling: Pooling,
        normalize: bool,
        cache_salt: str,
        **ignored: Any,
    ) -> ScriptedRequest:
        """Its vector holds the number of tokens, and what was asked."""
        request = self.make_request(request_id, prompt, SamplingParams(), cache_salt=cache_salt)
        request.embedding = [len(request.prompt_token_ids), float(pooling == "mean"), float(normalize), 0.1]
        return request

    def on_failure(self, callback: Callable[[str], None]) -> None:
        self.fail = callback

    # The engine's thread

    def _check_thread(self) -> None:
        current = threading.get_ident()
        self._thread = self._thread or current
        assert self._thread == current, "two threads drive the engine"

    def add(self, pending: ScriptedRequest) -> None:
        self._check_thread()
        if pending.contains(NEVER_FITS_PROMPT):
            raise RequestError("the prompt can never fit the KV cache", param="prompt", code="context_length_exceeded")
        assert pending.request_id not in self.requests
        self.requests[pending.request_id] = pending

    def abort(self, request_id: str) -> None:
        self._check_thread()
        if self.requests.pop(request_id, None) is not None:
            self.aborted.append(request_id)

    def step(self) -> list[RequestOutput]:
        self._check_thread()
        if self.on_scheduled is not None:
            self.on_scheduled()
        with self._may_step:
            while not self._may_step.wait_for(lambda: self.num_permits > 0, _LISTEN_SECONDS):
                if self.listens:
                    return []
            self.num_permits -= 1
        self.num_steps += 1
        running = self._running()
        if any(request.contains(DIE_PROMPT) for request in running):
            raise RuntimeError("a scripted failure of the device")
        return [self._advance(request) for request in running if self._is_prefilled(request)]

    def _is_prefilled(self, request: ScriptedRequest) -> bool:
        """Compute the next part of a prompt; whether that was all of it."""
        num_tokens = len(request.prompt_token_ids)
        request.num_computed_tokens += self.num_prefill_tokens or num_tokens
        return request.num_computed_tokens >= num_tokens

    def progress(self, request_ids: Collection[str]) -> list[RequestProgress]:
        self._check_thread()
        waiting = [request_id for request_id in self.requests if not self.has_started(request_id)]
        found = [
            self.requests[i] for i in request_ids if i in self.requests and not self.requests[i].choices[0].token_ids
        ]
        return [
            RequestProgress(
                request.request_id,
                waiting.index(request.request_id) + 1 if request.request_id in waiting else None,
                len(request.prompt_token_ids),
                request.num_computed_tokens,
            )
            for request in found
        ]

    @property
    def has_unfinished(self) -> bool:
        return bool(self.requests)

    @property
    def num_running(self) -> int:
        return len(self._running())

    @property
    def num_waiting(self) -> int:
        return len(self.requests) - self.num_running

    @property
    def num_free_blocks(self) -> int:
        return self.info.num_blocks - sum(
            -(-(len(r.prompt_token_ids) + len(c.token_ids)) // self.info.block_size)
            for r in self.requests.values()
            for c in r.choices
        )

    def load(self) -> EngineLoad:
        return EngineLoad(self.num_running, self.num_waiting, 0, self.num_free_blocks, 0)

    def has_started(self, request_id: str) -> bool:
        request = self.requests.get(request_id)
        return request is None or request in self._running()

    def shutdown(self) -> None:
        self._compiler.close()
        self.is_shut_down = True

    def _running(self) -> list[ScriptedRequest]:
        running: list[ScriptedRequest] = []
        num_sequences = 0
        for request in self.requests.values():
            num_sequences += request.params.n
            if running and num_sequences > self.info.max_num_seqs:
                break
            running.append(request)
        return running

    def _advance(self, request: ScriptedRequest) -> RequestOutput:
        error = "the logits are NaN" if request.contains(NAN_PROMPT) else None
        if request.embedding is not None and error is None:
            del self.requests[request.request_id]
            return RequestOutput(
                request_id=request.request_id,
                prompt=request.prompt,
                prompt_token_ids=request.prompt_token_ids,
                outputs=[],
                finished=True,
                embedding=request.embedding,
            )
        for choice in request.choices:
            if error is not None:
                choice.finish_reason = "error"
            elif choice.finish_reason is None:
                self._advance_choice(request, choice)
        if request.finished:
            del self.requests[request.request_id]
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[self._output(request, index, choice) for index, choice in enumerate(request.choices)],
            finished=request.finished,
            error=error,
        )

    def _advance_choice(self, request: ScriptedRequest, choice: _Choice) -> None:
        script = choice.script or self.script
        token_id = script[len(choice.token_ids) % len(script)]
        choice.token_ids.append(token_id)
        choice.detokenizer.feed([token_id])
        if choice.detokenizer.stop_reason is not None:
            choice.finish_reason, choice.stop_reason = "stop", choice.detokenizer.stop_reason
        elif choice.script is not None and len(choice.token_ids) == len(choice.script):
            choice.finish_reason = "stop"
            choice.detokenizer.finish()
        elif len(choice.token_ids) >= request.max_tokens:
            choice.finish_reason = "length"
            choice.detokenizer.finish()

    def _output(self, request: ScriptedRequest, index: int, choice: _Choice) -> CompletionOutput:
        wants = request.params.logprobs is not None
        return CompletionOutput(
            index=index,
            text=choice.detokenizer.text,
            token_ids=list(choice.token_ids),
            logprobs=[{token_id: Logprob(-0.5, 1)} for token_id in choice.token_ids] if wants else None,
            finish_reason=choice.finish_reason,  # type: ignore[arg-type]
            stop_reason=choice.stop_reason,
        )
