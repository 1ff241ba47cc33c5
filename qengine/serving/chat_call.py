"""A conversation on its way to the engine, whatever API it came by: its prompt, its job, the form of its answers.

Invariant: what a conversation means is decided here and in chat_form alone. The routes read requests into a
`ChatCompletionRequest` and give answers their shape; nothing else is theirs.
"""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from qengine.request import RequestOutput
from qengine.serving.chat_form import ChatForm, template_message
from qengine.serving.generation import (
    Delta,
    Job,
    cache_salt,
    check_num_logprobs,
    check_prompt_chars,
    sampling_params,
    trace_parent,
)
from qengine.serving.limits import LIMITS
from qengine.serving.logprobs import chat_logprobs
from qengine.serving.protocol import ChatCompletionRequest, Prompt
from qengine.serving.service import service_of


class ChatCall:
    """One call. The request's body must have been read.

    Args:
        http: the HTTP request; whose key, trace and application count.
        request: what it asks.
        id: of the answer.
        is_cut_to_fit: fewer tokens than were asked for, where the context holds no more, are no error.

    Attributes:
        model: the name that answers carry.
        num_top: log-probabilities per token.

    Raises:
        ApiError, RequestError: it asks for another model, or what this one cannot do. ApiError (503): not now.
    """

    def __init__(self, http: Request, request: ChatCompletionRequest, *, id: str, is_cut_to_fit: bool = False) -> None:
        service = service_of(http)
        service.check_model(request.model)
        engine = service.ready_engine()
        check_num_logprobs(request.top_logprobs, "top_logprobs", service.max_logprobs)
        check_num_logprobs(request.prompt_logprobs, "prompt_logprobs", service.max_logprobs)
        num_chars = sum(message.num_chars for message in request.messages)
        check_prompt_chars(num_chars, engine.info.max_model_len, "messages")
        self.engine = engine
        self.request = request
        self.form = ChatForm(request, engine.tokenizer)
        self.model = service.model_names[0]
        self.num_top = request.top_logprobs or 0
        self.job = Job(
            prompts=self._render,
            num_prompts=1,
            prompt_param="messages",
            params=sampling_params(
                request,
                engine.info.default_sampling,
                max_tokens=request.token_limit,
                logprobs=self.num_top if request.logprobs else None,
                prompt_logprobs=request.prompt_logprobs,
                **self.form.sampling,
            ),
            token_limit=None if is_cut_to_fit else request.token_limit,
            add_special_tokens=bool(request.add_special_tokens),
            cache_salt=cache_salt(http, request.cache_salt),
            traceparent=trace_parent(http),
            id=id,
            form=lambda prompts: self.form.at(prompts[0]),
            logprobs_param="top_logprobs",
        )

    def _render(self) -> list[Prompt]:
        """The prompt's text. Runs in a thread."""
        tokenizer = self.engine.tokenizer
        messages = [template_message(message, index) for index, message in enumerate(self.request.messages)]
        if "developer" not in (tokenizer.chat_template or ""):
            for message in messages:
                if message["role"] == "developer":  # OpenAI's newer name; this model was trained on the older one.
                    message["role"] = "system"
        continues = bool(self.request.continue_final_message)
        adds_prompt = self.request.add_generation_prompt
        text = tokenizer.render_chat(
            messages,
            add_generation_prompt=not continues if adds_prompt is None else adds_prompt,
            continue_final_message=continues,
            tools=self.form.template_tools,
            max_chars=self.engine.info.max_model_len * LIMITS.prompt_chars_per_token,
            template_options=self.form.template_options,
        )
        return [text]

    def count_prompt_tokens(self) -> int:
        """Tokens of the prompt. May be slow."""
        adds_special = self.job.add_special_tokens
        return sum(
            len(self.engine.tokenizer.encode(text, add_special_tokens=adds_special))
            for text in self.job.prompts()
            if isinstance(text, str)
        )

    def num_logprobs(self, output: RequestOutput) -> int:
        """How many log-probabilities an answer tells."""
        of_prompt = len(output.prompt_logprobs or ()) * ((self.request.prompt_logprobs or 0) + 1)
        if not self.request.logprobs:
            return of_prompt
        return of_prompt + sum(len(choice.token_ids) for choice in output.outputs) * (self.num_top + 1)

    def logprobs(self, delta: Delta) -> dict[str, Any] | None:
        """Log-probabilities of the new tokens in chat's shape, if they were asked for."""
        if delta.logprobs is None:
            return None
        return chat_logprobs(self.engine.tokenizer, delta.token_ids, delta.logprobs, self.num_top)
