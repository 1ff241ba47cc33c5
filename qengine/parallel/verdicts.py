"""Verdicts on the ways between cards, and the file that keeps them for the next start.

Invariant: the file is replaced as a whole, so a reader never sees half of one; a file that cannot be understood is
passed over with a warning and written anew. It decides nothing: `peer_check` does.
"""

from __future__ import annotations

import contextlib
import enum
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qengine import environment

logger = logging.getLogger(__name__)

SCHEMA = 1
FILE_NAME = "peer-check.json"
#: More than any number of cards needs; a file beyond it is not ours.
_MAX_FILE_BYTES = 2**20


class Route(enum.Enum):
    """How tensors go from card to card."""

    #: Directly, wherever NCCL wants to.
    PEER = "peer"
    #: By NCCL, through host memory.
    NCCL_HOST = "nccl-host"
    #: By `HostStagedTransport`, without NCCL.
    HOST_STAGED = "host-staged"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that ranks need to keep to it."""
        return {"NCCL_P2P_DISABLE": "1"} if self is Route.NCCL_HOST else {}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A route, and why it is not a better one; for the best, None or how it was chosen."""

    route: Route
    reason: str | None


@dataclass(frozen=True, slots=True)
class Cards:
    """What a verdict holds for: the cards of all ranks, in order, and the versions of the driver and of NCCL."""

    uuids: tuple[str, ...]
    driver: str
    nccl: str = "unknown"


class VerdictFile:
    """Verdicts by cards and versions, as JSON."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @staticmethod
    def default() -> VerdictFile:
        """The file in the cache folder."""
        return VerdictFile(environment.cache_dir() / FILE_NAME)

    def find(self, cards: Cards, *, peers_allowed: bool) -> Verdict | None:
        """What is known of these cards. Whether direct copies were allowed makes two questions of one."""
        record = self._load().get(_key(cards, peers_allowed))
        if record is None:
            return None
        try:
            reason = record["reason"]
            if reason is not None and not isinstance(reason, str):
                raise TypeError("the reason is not text")
            return Verdict(Route(record["route"]), reason)
        except (KeyError, TypeError, ValueError) as error:
            logger.warning("%s: a verdict cannot be understood (%s); the cards are checked again", self.path, error)
            return None

    def keep(self, cards: Cards, verdict: Verdict, *, peers_allowed: bool) -> None:
        """Remember a verdict. A folder that cannot be written costs a check at the next start, and no more."""
        verdicts = {
            **self._load(),
            _key(cards, peers_allowed): {"route": verdict.route.value, "reason": verdict.reason},
        }
        text = json.dumps({"schema": SCHEMA, "verdicts": verdicts}, indent=1) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self.path, text)
        except OSError as error:
            logger.warning("%s cannot be written (%s); the next start checks the cards again", self.path, error)

    def _load(self) -> dict[str, Any]:
        try:
            with open(self.path, "rb") as file:
                data = file.read(_MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            return {}
        except OSError as error:
            logger.warning("%s cannot be read (%s); the cards are checked again", self.path, error)
            return {}
        try:
            return _parse(data)
        except (ValueError, RecursionError) as error:
            logger.warning("%s is passed over: %s; the cards are checked again", self.path, error)
            return {}


def _parse(data: bytes) -> dict[str, Any]:
    """The verdicts in a file. Raises ValueError."""
    if len(data) > _MAX_FILE_BYTES:
        raise ValueError(f"it has more than {_MAX_FILE_BYTES} bytes")
    record = json.loads(data)
    if not isinstance(record, Mapping) or record.get("schema") != SCHEMA:
        raise ValueError(f"its schema is not {SCHEMA}")
    verdicts = record.get("verdicts")
    if not isinstance(verdicts, dict):
        raise ValueError("it holds no verdicts")
    return verdicts


def _key(cards: Cards, peers_allowed: bool) -> str:
    versions = f"driver {cards.driver}; NCCL {cards.nccl}"
    return f"{', '.join(cards.uuids)}; {versions}{'' if peers_allowed else '; without direct copies'}"


def _replace(path: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
