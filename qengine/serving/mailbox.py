"""Mailbox: what the engine has told one caller and the caller has not taken yet.

Invariant: of each request only the latest report is kept, so a slow reader makes nothing grow. It is touched in the
event loop only and knows nothing of the engine.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from qengine.errors import QEngineError
from qengine.request import RequestOutput, RequestProgress

#: What one request tells its caller. Progress comes before all outputs.
Report = RequestOutput | RequestProgress


@dataclass(slots=True)
class Mailbox:
    """What one caller has not taken yet."""

    latest: dict[str, Report] = field(default_factory=dict)
    error: QEngineError | None = None
    is_expired: bool = False
    filled: asyncio.Event = field(default_factory=asyncio.Event)

    def fail(self, error: QEngineError) -> None:
        self.error = error
        self.filled.set()

    def expire(self, error: QEngineError) -> None:
        """Fail even if there are outputs that nobody has taken."""
        self.is_expired = True
        self.fail(error)

    async def take(self) -> list[Report]:
        """The latest of each request that told something since the last call, waiting for at least one.

        Raises:
            RequestError: the engine refused a request. EngineDeadError: the engine stopped.
            QueueTimeoutError, RequestTimeoutError: it took too long.
        """
        while not self.latest or self.is_expired:
            if self.error is not None:
                raise self.error
            self.filled.clear()
            await self.filled.wait()
        reports, self.latest = list(self.latest.values()), {}
        return reports
