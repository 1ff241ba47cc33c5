"""Every bound on what a client may send, in one table that validators, documentation and tests read.

Invariant: every number that a client controls is bounded on both sides before it reaches the engine. Bounds that depend
on the model or on an option (context length, vocabulary, --max-logprobs, the queue) are checked where those are known.
"""

from __future__ import annotations

from dataclasses import dataclass

from qengine.grammars.compiler import COMPILE_SECONDS
from qengine.grammars.sources import MAX_CHOICES, MAX_GRAMMAR_BYTES, MAX_REGEX_BYTES, MAX_SCHEMA_BYTES, MAX_SCHEMA_DEPTH


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes in bytes, characters or items as the name says; times in seconds."""

    head_bytes: int = 64 * 1024
    num_headers: int = 100
    head_seconds: float = 10.0
    body_bytes: int = 8 * 1024 * 1024
    body_seconds: float = 30.0
    #: Of all bodies that are being read.
    bodies_bytes: int = 256 * 1024 * 1024
    #: Bodies up to this are read even then.
    small_body_bytes: int = 64 * 1024
    #: Calls that turn text into tokens, or back, and wait for their turn or have it.
    num_text_calls: int = 128
    json_depth: int = 64
    json_keys: int = 10_000
    json_items: int = 500_000
    json_int_digits: int = 40
    model_name_chars: int = 1024
    prompt_chars_per_token: int = 16
    num_prompts: int = 256
    #: Longer texts are tokenized apart from the others, which they would hold up.
    long_text_chars: int = 256 * 1024
    num_messages: int = 2048
    num_tools: int = 128
    tool_name_chars: int = 64
    schema_bytes: int = MAX_SCHEMA_BYTES
    schema_depth: int = MAX_SCHEMA_DEPTH
    regex_bytes: int = MAX_REGEX_BYTES
    grammar_bytes: int = MAX_GRAMMAR_BYTES
    grammar_choices: int = MAX_CHOICES
    grammar_seconds: float = COMPILE_SECONDS
    #: Also for those who wait for other grammars.
    grammar_wait_seconds: float = 30.0
    num_choices: int = 8
    num_stop_strings: int = 8
    stop_chars: int = 256
    num_token_ids: int = 1024
    num_logit_bias: int = 1024
    logit_bias_magnitude: float = 100.0
    #: In one answer: positions times the tokens that are told of each.
    num_logprobs: int = 2**20
    max_tokens: int = 2**31 - 1
    token_id: int = 2**31 - 1
    top_k: int = 1_000_000
    temperature: float = 2.0
    penalty: float = 2.0
    seed: int = 2**63 - 1
    template_kwargs_bytes: int = 4096
    cache_salt_chars: int = 128
    num_metadata: int = 16
    metadata_key_chars: int = 64
    metadata_value_chars: int = 512
    shown_chars: int = 200
    stalled_stream_seconds: float = 60.0
    #: A reader that takes less than this in `stalled_stream_seconds` counts as stalled.
    stalled_stream_bytes: int = 4096
    #: What the kernel keeps for a client that does not read; it doubles this. Beyond it a stream is paused.
    send_buffer_bytes: int = 64 * 1024
    #: When a peer that vanished without a word is given up.
    dead_peer_seconds: int = 30
    num_connections: int = 8192
    #: A step that runs longer makes the server unhealthy, until it ends.
    stuck_step_seconds: float = 60.0
    retry_after_seconds: int = 1


LIMITS = Limits()
