"""What the server prints when it is ready: what runs, where, and a command to try it with.

Invariant: the command works as it stands in a shell, whatever the model is called; no key is ever shown.
"""

from __future__ import annotations

import json
import shlex
from typing import Any, Literal

from qengine import __version__
from qengine.engine import EngineInfo
from qengine.serving.options import ServerOptions

_GIB = 2**30
#: What a model can be asked with: a conversation, a plain text, or token ids alone.
Takes = Literal["messages", "text", "ids"]


def ready_banner(info: EngineInfo, name: str, url: str, options: ServerOptions, *, takes: Takes) -> str:
    """Several lines of text."""
    seconds = info.start_seconds.get("total")
    ready = "ready" if seconds is None else f"ready in {seconds:.1f} s"
    rows = {
        "model": f"{name} ({info.architecture}, {info.description})",
        "runs as": f"{info.dtype} on {info.device}, weights {info.weight_bytes / _GIB:.2f} GiB",
        "context": f"{info.max_model_len} tokens; KV cache {info.num_blocks * info.block_size} tokens, "
        f"{info.kv_cache_bytes / _GIB:.2f} GiB",
        "address": f"{options.uds} (unix socket)" if options.uds is not None else url,
        "access": f"{len(options.api_keys)} API key(s)" if options.api_keys else "no API key",
    }
    lines = [f"qengine {__version__} {ready}"]
    lines += [f"  {label:<8} {text}" for label, text in rows.items()]
    return "\n".join((*lines, "", "Try it:", "", try_command(name, url, options, takes=takes), ""))


def try_command(name: str, url: str, options: ServerOptions, *, takes: Takes) -> str:
    """A curl command, ready to paste."""
    body: dict[str, Any] = {"model": name}
    if takes == "messages":
        route = "/v1/chat/completions"
        body.update(messages=[{"role": "user", "content": "What is the capital of France?"}], temperature=0)
    else:
        route = "/v1/completions"
        prompt: str | list[int] = "The capital of France is" if takes == "text" else [1, 2, 3]
        body.update(prompt=prompt, max_tokens=16, temperature=0)
    parts = [f"  curl {shlex.quote(url + route)}"]
    if options.uds is not None:
        parts.append(f"--unix-socket {shlex.quote(options.uds)}")
    if options.ssl_certfile is not None:
        parts.append("--insecure")
    if options.api_keys:
        parts.append('-H "Authorization: Bearer $QENGINE_API_KEY"')
    parts.append("-H 'Content-Type: application/json'")
    parts.append(f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}")
    return " \\\n    ".join(parts)
