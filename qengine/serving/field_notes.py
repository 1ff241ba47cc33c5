"""A line on every field that clients may send, for /openapi.json and /docs.

Invariant: a test holds this table to the models: no field without a note, no note without a field.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

FIELD_NOTES: Mapping[str, str] = MappingProxyType(
    {
        # Asking
        "model": "one of the names that /v1/models lists",
        "messages": "the conversation; content is text, as a string or in parts of type text",
        "prompt": "text, token ids, or a list of either",
        "input": "text, or items: messages, function calls, their outputs, reasoning",
        "instructions": "a system message before the input",
        "stream": "send the answer as server-sent events",
        "stream_options": "what else a stream tells",
        "include_usage": "a last chunk counts tokens; of a response the usage comes in any case",
        "include_progress": "until the first token, chunks tell of the place in the queue and of the prompt",
        "include_obfuscation": "must not be true: streams are not padded",
        # Length
        "max_tokens": "tokens to generate at most; as many as fit (chat) or 16 (completions) if left out",
        "max_completion_tokens": "the newer name of max_tokens",
        "max_output_tokens": "tokens to generate at most, thoughts included; as many as fit if left out",
        "min_tokens": "no end before that many tokens",
        "stop": "a string or several that end the text",
        "stop_token_ids": "token ids that end the text",
        "include_stop_str_in_output": "keep the string that ended the text",
        "ignore_eos": "go on after the model's own end",
        # Sampling
        "temperature": "0 always takes the likeliest token; the model's own default if left out, as for the next three",
        "top_p": "only the likeliest tokens that together have this probability",
        "top_k": "only that many likeliest tokens; 0 and -1 are off",
        "min_p": "only tokens at least that many times as likely as the likeliest",
        "repetition_penalty": "above 1 against tokens that were there, prompt included",
        "presence_penalty": "against tokens that the answer has",
        "frequency_penalty": "the same for each time",
        "seed": "makes an answer repeatable, whatever else runs; choice i uses seed + i",
        "logit_bias": "token id -> what is added to its logit",
        "allowed_token_ids": "no other tokens",
        "n": "answers to each prompt",
        "best_of": "must be 1 or n",
        # Form
        "response_format": "JSON, or JSON of a schema; enforced whatever strict says",
        "structured_outputs": "one form of vLLM's: json, json_object, regex, choice or grammar",
        "guided_json": "an older name of structured_outputs.json",
        "guided_regex": "an older name of structured_outputs.regex",
        "guided_choice": "an older name of structured_outputs.choice",
        "guided_grammar": "an older name of structured_outputs.grammar",
        "json": "a JSON schema, as an object or as text",
        "json_object": "any JSON object",
        "regex": "a regular expression that the whole answer matches",
        "choice": "the answer is one of these",
        "grammar": "a grammar in the syntax of Lark, or llama.cpp's GBNF",
        "json_schema": "the schema and its name",
        "schema": "a JSON schema",
        "text": "what is said; of a response, the form of its answer",
        "format": "text, JSON, or JSON of a schema",
        "verbosity": "must be medium",
        # Tools and thoughts
        "tools": "functions that the model may call; not for completions",
        "tool_choice": "none, auto, required, or one function; of a response also some of the tools",
        "parallel_tool_calls": "false for one call at most",
        "parameters": "the JSON schema of the arguments",
        "strict": "hold the arguments to the schema even if the model calls by itself",
        "defer_loading": "must not be true",
        "include_reasoning": "false leaves thoughts out",
        "reasoning": "how to think; of a message, what was thought before it",
        "effort": "passed on to a chat template that knows one; none ends thinking where the template can",
        "summary": "thoughts come as they are: only auto is taken",
        "generate_summary": "the older name of summary",
        "context": "must be auto",
        "mode": "must be standard; or of allowed tools: whether one has to be called",
        "reasoning_content": "what was thought before a message",
        "encrypted_content": "of another server's thoughts: cannot be read",
        # Log-probabilities
        "logprobs": "of chat whether, of completions how many log-probabilities each token gets",
        "top_logprobs": "likeliest tokens for each place, up to --max-logprobs",
        "echo": "begin the text with the prompt, and score it if logprobs is given",
        "include": "message.output_text.logprobs gives log-probabilities; the others have nothing to add here",
        # Prompts
        "add_special_tokens": "let the tokenizer add its own; off for chat, on for completions",
        "skip_special_tokens": "leave special tokens out of the text, as by default",
        "add_generation_prompt": "end the prompt with the header of an answer, as by default",
        "continue_final_message": "go on with the last message instead of answering it",
        "chat_template_kwargs": "options of the chat template, such as enable_thinking",
        "cache_salt": "requests with another one share no cached prompts with this",
        "truncation": "nothing is ever cut: a prompt that does not fit is refused, also with auto",
        # Messages and items
        "role": "who says it",
        "content": "what is said",
        "name": "of whom or what",
        "description": "for the model",
        "type": "which kind it is",
        "function": "the function",
        "arguments": "JSON text",
        "tool_calls": "what an earlier answer called",
        "tool_call_id": "the call that this is the result of",
        "call_id": "what a call and its output have in common",
        "id": "of an earlier call",
        "output": "what the call gave",
        "refusal": "what was said instead of an answer",
        # Kept
        "metadata": "comes back with the response",
        "store": "accepted, but nothing is kept: the response says false",
        "max_tool_calls": "counts calls of hosted tools, of which there are none",
    }
)
