"""What `generate` and `chat` share: requests run to their end in this thread, yielding what is new.

Invariant: whatever ends the loop, the engine holds none of these requests afterwards.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from qengine.engine import Engine, PendingRequest
from qengine.errors import QEngineError
from qengine.request import RequestOutput, SamplingParams


def sampling_params(engine: Engine, given: Mapping[str, Any]) -> SamplingParams:
    """The flags over what the model recommends."""
    return SamplingParams(**{**engine.info.default_sampling, **given})


def run_requests(
    engine: Engine, pending: Sequence[PendingRequest], should_stop: Callable[[], bool] = lambda: False
) -> Iterator[RequestOutput]:
    """Yield the outputs of every step until all have ended, or `should_stop()` says so between two steps.

    Raises:
        QEngineError: if a request failed inside the engine.
    """
    try:
        for request in pending:
            engine.add(request)
        while engine.has_unfinished and not should_stop():
            for output in engine.step():
                if output.error is not None:
                    raise QEngineError(f"the answer failed: {output.error}")
                yield output
    finally:
        for request in pending:
            engine.abort(request.request_id)


def print_as_it_comes(outputs: Iterator[RequestOutput]) -> RequestOutput | None:
    """Write the text of a single request as it grows, and return its last output (None if there was none)."""
    last, num_shown = None, 0
    for output in outputs:
        last = output
        text = output.outputs[0].text
        if len(text) > num_shown:
            sys.stdout.write(text[num_shown:])
            sys.stdout.flush()
            num_shown = len(text)
    return last
