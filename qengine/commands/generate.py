"""`qengine generate`: continue prompts and print the text, or JSON.

One prompt is written as it comes; several run in one batch under a progress bar and are printed in their order.
Standard output carries the answers alone.
"""

from __future__ import annotations

import json
import sys

from tqdm import tqdm

from qengine.commands.running import print_as_it_comes, run_requests, sampling_params
from qengine.commands.settings import GenerateSettings
from qengine.engine import Engine, PendingRequest
from qengine.request import RequestOutput
from qengine.runtime.start_times import process_age
from qengine.tokenizer.tokenizer import most_chars


def run(settings: GenerateSettings) -> int:
    """Returns the exit code. Raises QEngineError."""
    engine = Engine.start(settings.engine, show_progress=sys.stderr.isatty(), import_seconds=process_age())
    try:
        pending = _make_requests(engine, settings)
        if len(pending) == 1 and not settings.as_json:
            print_as_it_comes(run_requests(engine, pending))
            print()
        else:
            _print_all(engine, pending, settings)
    finally:
        engine.shutdown()
    return 0


def _make_requests(engine: Engine, settings: GenerateSettings) -> list[PendingRequest]:
    params = sampling_params(engine, settings.sampling)
    requests = []
    for index, prompt in enumerate(settings.prompts):
        text = prompt
        if settings.use_chat_template:
            message = {"role": "user", "content": prompt}
            max_chars = most_chars(engine.info.max_model_len)
            text = engine.tokenizer.render_chat([message], add_generation_prompt=True, max_chars=max_chars)
        requests.append(
            engine.make_request(str(index), text, params, add_special_tokens=not settings.use_chat_template)
        )
    return requests


def _print_all(engine: Engine, pending: list[PendingRequest], settings: GenerateSettings) -> None:
    finished: dict[str, RequestOutput] = {}
    hidden = len(pending) == 1 or not sys.stderr.isatty()
    with tqdm(total=len(pending), desc="Generating", unit=" prompts", disable=hidden, leave=False) as bar:
        for output in run_requests(engine, pending):
            if output.finished:
                finished[output.request_id] = output
                bar.update()
    for request, prompt in zip(pending, settings.prompts, strict=True):
        output = finished[request.request_id]
        if settings.as_json:
            print(_as_json(prompt, output))
        else:
            print(f"=== {_one_line(prompt)}\n{output.outputs[0].text}\n")


def _one_line(prompt: str, limit: int = 76) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _as_json(prompt: str, output: RequestOutput) -> str:
    choice = output.outputs[0]
    record = {
        "prompt": prompt,
        "text": choice.text,
        "finish_reason": choice.finish_reason,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_tokens": len(choice.token_ids),
    }
    return json.dumps(record, ensure_ascii=False)
