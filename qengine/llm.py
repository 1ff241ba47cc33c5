"""LLM: the Python API for a list of prompts. The names, defaults and results are vLLM's.

    with LLM("path/to/model") as llm:
        for output in llm.generate(["Hello"], SamplingParams(max_tokens=32)): print(output.outputs[0].text)

Invariant: outputs come back in the order of the prompts; if one prompt is refused nothing was generated and nothing is
left in the engine. It drives its engine in the calling thread and is not itself thread-safe.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from tqdm import tqdm

from qengine.config import EngineConfig
from qengine.engine import Engine, PendingRequest
from qengine.errors import EngineDeadError, RequestError
from qengine.request import EmbeddingOutput, EmbeddingRequestOutput, Pooling, RequestOutput, SamplingParams
from qengine.tokenizer.tokenizer import most_chars

Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]


class LLM:
    """A model, loaded and ready to generate.

    Args:
        model: a folder, a .gguf file, a hub id, or None for the bundled model.
        tokenizer: a folder with another tokenizer.
        quantization: "awq", "gptq" or "compressed-tensors"; None reads it from the file, disagreeing with the file is
            an error.
        dtype: "auto", "bfloat16", "float16" or "float32" (float32 is the exact, slow path).
        tensor_parallel_size: devices that share each layer, each driven by a process of its own.
        pipeline_parallel_size: groups of devices that share the layers.
        step_timeout: seconds after which a step of several devices counts as hung.
        max_model_len: prompt and output in tokens; None is the model's own, "auto" the largest that fits.
        gpu_memory_utilization: fraction of a GPU's memory to use.
        kv_cache_dtype: "auto" is the compute dtype.
        block_size: tokens per KV block.
        enable_prefix_caching: reuse the KV blocks of prompts that begin alike.
        max_num_batched_tokens: tokens computed in one step; longer prompts are split.
        max_num_seqs: sequences in one step.
        enforce_eager: no CUDA graphs.
        seed: for requests that give none.
        device: "auto" or "cpu".
        kv_cache_memory_bytes: size of the KV cache; an int is bytes, "4GiB" works too.
        load_format: "auto", or "dummy" for random weights of the right shapes.
        skip_check: start even if the weights compute NaN or infinity.
        verify: compare every file with the SHA-256 in the folder's manifest.json before weights are read.
        bits, group_size: how dummy weights are quantized; None is what the config says, else 4 and 128.

    Raises:
        ConfigError: an option is wrong; LoadError: the model cannot be loaded. Both before weights are read.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        tokenizer: str | None = None,
        quantization: str | None = None,
        dtype: str = "auto",
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        step_timeout: float = 60.0,
        max_model_len: int | str | None = None,
        gpu_memory_utilization: float = 0.92,
        kv_cache_dtype: str = "auto",
        block_size: int = 16,
        enable_prefix_caching: bool = True,
        max_num_batched_tokens: int | None = None,
        max_num_seqs: int = 256,
        enforce_eager: bool = False,
        seed: int = 0,
        device: str = "auto",
        kv_cache_memory_bytes: int | str | None = None,
        load_format: str = "auto",
        bits: int | None = None,
        group_size: int | None = None,
        skip_check: bool = False,
        verify: bool = False,
        **more_options: Any,
    ) -> None:
        options = {
            "model": model,
            "tokenizer": tokenizer,
            "quantization": quantization,
            "dtype": dtype,
            "tensor_parallel_size": tensor_parallel_size,
            "pipeline_parallel_size": pipeline_parallel_size,
            "step_timeout": step_timeout,
            "max_model_len": max_model_len,
            "gpu_memory_utilization": gpu_memory_utilization,
            "kv_cache_dtype": kv_cache_dtype,
            "block_size": block_size,
            "enable_prefix_caching": enable_prefix_caching,
            "max_num_batched_tokens": max_num_batched_tokens,
            "max_num_seqs": max_num_seqs,
            "enforce_eager": enforce_eager,
            "seed": seed,
            "device": device,
            "kv_cache_memory_bytes": kv_cache_memory_bytes,
            "load_format": load_format,
            "bits": bits,
            "group_size": group_size,
            "skip_check": skip_check,
            "verify": verify,
            **more_options,
        }
        self.engine = Engine.start(EngineConfig.from_options(options))
        self._ids = itertools.count()
        self._is_open = True

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def shutdown(self) -> None:
        """Release the model and its memory. Idempotent."""
        self._is_open = False
        self.engine.shutdown()

    def default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json recommends."""
        return SamplingParams(**self.engine.info.default_sampling)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue every prompt.

        Args:
            prompts: a string, a list of token ids, ``{"prompt": ...}``, ``{"prompt_token_ids": ...}``, or a list of
                such prompts.
            sampling_params: one for all, or one per prompt; None takes the model's recommended ones.
            use_tqdm: show progress.

        Returns:
            One output per prompt, in order.

        Raises:
            RequestError: a prompt or parameter is refused; nothing was generated.
        """
        items = _prompt_list(prompts)
        return self._run([self._pending(p, s) for p, s in self._pair(items, sampling_params)], use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """A vector for every prompt: the model's hidden states after its final norm, pooled.

        Args:
            prompts: as of `generate`.
            pooling: the last token's state, as models made for embedding want it, or the mean over all tokens.
            normalize: scale vectors to length 1.
            use_tqdm: show progress.

        Returns:
            One output per prompt, in order; ``output.outputs.embedding`` is a list of floats [hidden].

        Raises:
            RequestError: a prompt or option is refused, or a vector would not be finite.
        """
        self._check_open()
        pending = [
            self.engine.make_embedding_request(str(next(self._ids)), _plain(p), pooling=pooling, normalize=normalize)
            for p in _prompt_list(prompts)
        ]
        return [_embedded(output) for output in self._run(pending, use_tqdm, "Embedding")]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, each a list of ``{"role": ..., "content": ...}``.

        Raises:
            RequestError: the conversation is malformed, refused by the model's template, or too long.
        """
        conversations = _conversation_list(messages)
        texts = [
            self.engine.tokenizer.render_chat(
                conversation,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                max_chars=most_chars(self.engine.info.max_model_len),
                template_options=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        pending = [
            self._pending(text, params, add_special_tokens=False) for text, params in self._pair(texts, sampling_params)
        ]
        return self._run(pending, use_tqdm)

    def _pair(
        self, items: Sequence[Any], params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[tuple[Any, SamplingParams]]:
        if params is None:
            params = self.default_sampling_params()
        if isinstance(params, SamplingParams):
            return [(item, params) for item in items]
        if len(params) != len(items):
            raise RequestError(
                f"{len(items)} prompts but {len(params)} sampling_params; give one for all or one per prompt",
                param="sampling_params",
            )
        return list(zip(items, params, strict=True))

    def _pending(self, prompt: Prompt, params: SamplingParams, *, add_special_tokens: bool = True) -> PendingRequest:
        self._check_open()
        request_id = str(next(self._ids))
        return self.engine.make_request(request_id, _plain(prompt), params, add_special_tokens=add_special_tokens)

    def _check_open(self) -> None:
        if not self._is_open:
            raise EngineDeadError("this LLM has been shut down; make a new one")

    def _run(self, pending: list[PendingRequest], use_tqdm: bool, doing: str = "Generating") -> list[RequestOutput]:
        finished: dict[str, RequestOutput] = {}
        bar = tqdm(total=len(pending), desc=doing, unit=" prompts", disable=not use_tqdm)
        num_tokens = 0
        try:
            for request in pending:
                self.engine.add(request)
            while self.engine.has_unfinished:
                for output in self.engine.step():
                    if output.finished:
                        finished[output.request_id] = output
                        num_tokens += _num_tokens(output)
                        bar.set_postfix_str(f"{num_tokens / max(bar.format_dict['elapsed'], 1e-9):.0f} tok/s")
                        bar.update()
        finally:
            # Ctrl-C or a refused prompt: what is left must not run with the next call.
            for request in pending:
                self.engine.abort(request.request_id)
            bar.close()
        return [finished[request.request_id] for request in pending]


def _prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list of prompts."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Sequence):
        raise RequestError(
            f"prompts is {type(prompts).__name__}, expected text, token ids, a dict, or a list of them", param="prompts"
        )
    items = list(prompts)
    if items and all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        return [items]  # type: ignore[list-item]
    for item in items:
        if not isinstance(item, str | Mapping | Sequence):
            raise RequestError(
                f"prompts holds {type(item).__name__}, expected strings, lists of token ids or dicts", param="prompts"
            )
    return items  # type: ignore[return-value]


def _num_tokens(output: RequestOutput) -> int:
    """What an output's speed is counted in: tokens that were generated, or read."""
    if output.embedding is not None:
        return len(output.prompt_token_ids)
    return sum(len(choice.token_ids) for choice in output.outputs)


def _embedded(output: RequestOutput) -> EmbeddingRequestOutput:
    if output.embedding is None:
        raise RequestError(f"a prompt has no embedding: {output.error}", param="prompts")
    embedding = EmbeddingOutput(output.embedding)
    return EmbeddingRequestOutput(output.request_id, output.prompt, output.prompt_token_ids, embedding)


def _plain(prompt: Prompt) -> str | Sequence[int]:
    return _content(prompt) if isinstance(prompt, Mapping) else prompt


def _content(prompt: Mapping[str, Any]) -> str | Sequence[int]:
    keys = set(prompt)
    if keys == {"prompt"} and isinstance(prompt["prompt"], str):
        return str(prompt["prompt"])
    if keys == {"prompt_token_ids"}:
        return list(prompt["prompt_token_ids"])
    raise RequestError(
        f"a prompt dict has keys {sorted(map(str, keys))}, expected 'prompt' (text) or 'prompt_token_ids'",
        param="prompts",
    )


def _conversation_list(messages: Sequence[Any]) -> list[Sequence[Message]]:
    if not messages:
        raise RequestError("messages is empty; give at least one message", param="messages")
    if all(isinstance(item, Mapping) for item in messages):
        return [messages]
    if all(isinstance(item, Sequence) and not isinstance(item, str) for item in messages):
        return list(messages)
    raise RequestError("messages must be a list of message dicts, or a list of such lists", param="messages")
