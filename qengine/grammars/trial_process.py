"""The other side of `trial`: a process that compiles strangers' grammars, so that the server's need not be the first.

It reads a vocabulary, then one source after the other, and answers each with what the library reads or the reason why
not. Invariant: an alarm ends it if one source takes too much processor time, even inside the library, or too long, even
if nobody waits any more; its memory is bounded. It knows nothing of models and requests.
"""

from __future__ import annotations

import json
import resource
import signal
import struct
import sys
from typing import IO, Any

from qengine.errors import GrammarError
from qengine.grammars.library import library_text, new_matcher
from qengine.grammars.sources import GrammarSource
from qengine.grammars.vocabulary import Vocabulary

_MEMORY_BYTES = 4 * 2**30
_LENGTH = struct.Struct("<I")


def send(stream: IO[bytes], message: Any) -> None:
    """Write a message: its length, then JSON."""
    data = json.dumps(message).encode()
    stream.write(_LENGTH.pack(len(data)) + data)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """The next message, None at the end of the stream."""
    head = stream.read(_LENGTH.size)
    return json.loads(stream.read(*_LENGTH.unpack(head))) if len(head) == _LENGTH.size else None


def vocabulary_message(vocabulary: Vocabulary) -> dict[str, Any]:
    """The vocabulary as JSON; a byte becomes the character of its number."""
    return {
        "tokens": [data.decode("latin-1") for data in vocabulary.tokens],
        "special_ids": sorted(vocabulary.special_ids),
        "eos_ids": sorted(vocabulary.eos_ids),
    }


def _vocabulary(message: dict[str, Any]) -> Vocabulary:
    tokens = tuple(text.encode("latin-1") for text in message["tokens"])
    return Vocabulary(tokens, frozenset(message["special_ids"]), frozenset(message["eos_ids"]))


def _try(vocabulary: Vocabulary, source: GrammarSource) -> dict[str, str]:
    try:
        text = library_text(source)
        matcher = new_matcher(vocabulary.for_library, text)
        matcher.compute_bitmask()
    except (GrammarError, ValueError, RecursionError) as error:
        return {"error": str(error) or type(error).__name__}
    return {"error": matcher.get_error()} if matcher.is_error() else {"text": text}


def main(processor_seconds: float, seconds: float) -> None:
    """Answer sources until the other side closes the stream; each has so much of both."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    vocabulary = _vocabulary(receive(sys.stdin.buffer))
    _ = vocabulary.for_library
    send(sys.stdout.buffer, {"ready": True})
    while (message := receive(sys.stdin.buffer)) is not None:
        # Nobody handles these signals, so they end the process wherever it is.
        signal.setitimer(signal.ITIMER_PROF, processor_seconds)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        answer = _try(vocabulary, GrammarSource(**message))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(sys.stdout.buffer, answer)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
