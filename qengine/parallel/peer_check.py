"""Which way tensors go between the cards of one engine: decided by a check, before any rank depends on it.

Some boards say that cards reach each other's memory, and then copies arrive as zeros or never. So `choose_route`
starts a probe (`peer_probe`), one process per rank, with a limit on its time: copies both ways byte for byte, and sums
of known numbers. Whatever goes wrong in it, a crash or a stall included, is a verdict and not a failure of the engine:

    cards = identify_cards(devices)                 # ["cuda:0", "cuda:1"]
    verdict = choose_route(config.parallel.p2p, cards, devices, verdicts=VerdictFile.default())
    variables |= verdict.route.environment          # of every rank, before it starts
    if verdict.route is Route.HOST_STAGED: ...      # `HostStagedTransport` for all tensors, no NCCL

A verdict is kept for these cards, this driver and this NCCL, unless what went wrong may be of the moment, as memory
that is taken or a machine that is busy. Invariant: the route that is returned has passed a check on these cards, now or
then, unless the user said "on", and except host memory, which needs none.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from qengine import environment
from qengine.config import P2P_MODES
from qengine.parallel import children
from qengine.parallel.peer_probe import DONE, Spec
from qengine.parallel.rendezvous import inherited_path, meeting_file
from qengine.parallel.verdicts import Cards, Route, Verdict, VerdictFile

logger = logging.getLogger(__name__)

#: Seconds for the check itself, from when all probes are up.
LIMIT_S = 10.0
#: Seconds for the probes to come up: Python and torch are read from disk.
START_LIMIT_S = 60.0
#: How a library ends its process; SIGKILL is somebody else's, such as a system that is out of memory.
_CRASHES = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL)
_POLL_SECONDS = 0.01
_TAIL_BYTES = 4096
_PROBE = (sys.executable, "-m", "qengine.parallel.peer_probe")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a probe has found.

    Attributes:
        fault: what is wrong, or None.
        is_about_cards: whether it says something of the cards: data that came out wrong, a crash in a library. A probe
            that never came up does not, nor does one that raised (no memory is left, torch has no NCCL) or was killed.
        is_stall: nothing came within the limit. That is of the cards if another way between them is in time.
    """

    fault: str | None
    is_about_cards: bool = True
    is_stall: bool = False


@dataclass(frozen=True, slots=True)
class Prober:
    """Starts probes. `command` starts one rank's, with its spec as the last argument; times are in seconds."""

    command: Sequence[str] = _PROBE
    limit_s: float = LIMIT_S
    start_limit_s: float = START_LIMIT_S

    def probe(self, devices: Sequence[str], *, copies: bool, variables: Mapping[str, str]) -> Outcome:
        """Check copies, unless told not to, and sums between devices, under some environment variables."""
        with meeting_file() as meeting, contextlib.ExitStack() as stack:
            ranks = []
            try:
                for rank in range(len(devices)):
                    spec = Spec(rank, tuple(devices), inherited_path(meeting), copies)
                    command = [*self.command, spec.to_text()]
                    ranks.append(stack.enter_context(_started(command, rank, variables, meeting)))
            except OSError as error:
                return Outcome(f"the check cannot be started: {error.strerror or error}", is_about_cards=False)
            return self._watch(ranks)

    def _watch(self, ranks: Sequence[_Probe]) -> Outcome:
        """Wait until all are done, or one has found a fault or ended, or time is up."""
        deadline = time.monotonic() + self.start_limit_s
        is_up = False
        while not all(probe.stage == DONE for probe in ranks):
            # Those that have ended are looked at before their last words are read, so that none is missed.
            ended = [probe for probe in ranks if probe.process.poll() is not None]
            for probe in ranks:
                probe.read()
            for probe in ranks:
                if probe.fault is not None:
                    return Outcome(probe.fault)
            if ended:
                return min(ended, key=_is_consequence).crash()
            if not is_up and all(probe.stage is not None for probe in ranks):
                is_up, deadline = True, time.monotonic() + self.limit_s
            if time.monotonic() > deadline:
                return _stalled(ranks, self.limit_s if is_up else self.start_limit_s)
            time.sleep(_POLL_SECONDS)
        return Outcome(None)


def _is_consequence(probe: _Probe) -> bool:
    """Whether the end of a probe may only be that it misses another: by an exception, or aborted by NCCL."""
    code = probe.process.returncode
    return code >= 0 or code == -signal.SIGABRT


class _Probe:
    """One rank's probe, as far as it has spoken."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes], errors: IO[bytes]) -> None:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        self.rank = rank
        self.process = process
        self.stage: str | None = None
        self.fault: str | None = None
        self._output = process.stdout
        self._errors = errors
        self._text = b""

    def read(self) -> None:
        """Take in what it has said since."""
        self._text += self._output.read() or b""
        *lines, self._text = self._text.split(b"\n")
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                # Libraries print too.
                continue
            if isinstance(record, dict):
                self.stage = record.get("stage", self.stage)
                self.fault = record.get("fault", self.fault)

    def crash(self) -> Outcome:
        """What its end means."""
        ended = children.how_it_ended(self.process.returncode)
        where = f" while {_WHILE.get(self.stage, self.stage)}" if self.stage else ""
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - _TAIL_BYTES))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        said = f": {lines[-1].strip()}" if lines else ""
        is_about_cards = self.stage is not None and -self.process.returncode in _CRASHES
        return Outcome(f"the check of card {self.rank} {ended}{where}{said}", is_about_cards=is_about_cards)


#: What a probe does in each of its stages.
_WHILE: Mapping[str | None, str] = {
    None: "starting",
    "copies": "copying between cards",
    "connecting": "the cards connect",
    "sums": "cards add up numbers",
}


@contextlib.contextmanager
def _started(command: Sequence[str], rank: int, variables: Mapping[str, str], meeting: int) -> Iterator[_Probe]:
    """A probe in a session of its own; it and all it has started are gone when the block is left."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            pass_fds=[meeting],
            env={**environment.for_rank(num_threads=1), **variables},
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin, process.stdout:
            try:
                yield _Probe(rank, process, errors)
            finally:
                children.end([process])


def _stalled(ranks: Sequence[_Probe], limit_s: float) -> Outcome:
    """Time is up. Those at the earliest stage hold up the others."""
    order = [*_WHILE, DONE]
    slowest = min(ranks, key=lambda probe: order.index(probe.stage) if probe.stage in order else len(order))
    doing = _WHILE.get(slowest.stage, slowest.stage)
    return Outcome(
        f"the check of card {slowest.rank} did not end within {limit_s:g} s while {doing}",
        is_about_cards=slowest.stage is not None,
        is_stall=True,
    )


def choose_route(
    mode: str,
    cards: Cards,
    devices: Sequence[str],
    *,
    verdicts: VerdictFile | None = None,
    prober: Prober | None = None,
) -> Verdict:
    """How tensors go between `devices`, one per rank, which are these cards. Logs one line.

    Args:
        mode: "auto" checks, "on" trusts the cards, "off" never copies from card to card.
        verdicts: where verdicts are kept; None keeps none.
    """
    assert mode in P2P_MODES, "config checks p2p"
    twice, is_kept = _shared_card(cards), False
    if twice is not None:
        verdict = Verdict(Route.HOST_STAGED, f"ranks {twice[0]} and {twice[1]} share one card")
    elif mode == "on":
        verdict = Verdict(Route.PEER, "not checked, as told")
    else:
        verdict, is_kept = _checked_route(mode, cards, devices, verdicts, prober or Prober())
    _log(verdict, verdicts if is_kept else None)
    return verdict


def _checked_route(
    mode: str, cards: Cards, devices: Sequence[str], verdicts: VerdictFile | None, prober: Prober
) -> tuple[Verdict, bool]:
    """A route that has passed a check, and whether its verdict is in the file."""
    why_off = None
    if mode == "off":
        why_off = "turned off by --p2p off"
    elif environment.nccl_p2p_disabled():
        why_off = "turned off by NCCL_P2P_DISABLE"
    known = verdicts.find(cards, peers_allowed=why_off is None) if verdicts else None
    if known is not None:
        return known, True
    verdict, is_lasting = _probe_routes(why_off, devices, prober)
    if verdicts is None or not is_lasting:
        return verdict, False
    verdicts.keep(cards, verdict, peers_allowed=why_off is None)
    return verdict, True


def _probe_routes(why_off: str | None, devices: Sequence[str], prober: Prober) -> tuple[Verdict, bool]:
    """The best route that passes, and whether this is worth remembering."""
    direct = Outcome(why_off)
    if why_off is None:
        direct = prober.probe(devices, copies=True, variables=Route.PEER.environment)
        if direct.fault is None:
            return Verdict(Route.PEER, None), True
    staged = prober.probe(devices, copies=False, variables=Route.NCCL_HOST.environment)
    if staged.fault is None:
        return Verdict(Route.NCCL_HOST, direct.fault), direct.is_about_cards
    reason = f"{direct.fault}; and with NCCL through host memory: {staged.fault}"
    # Where nothing is in time, the machine may just be busy.
    is_lasting = all(outcome.is_about_cards and not outcome.is_stall for outcome in (direct, staged))
    return Verdict(Route.HOST_STAGED, reason), is_lasting


def _shared_card(cards: Cards) -> tuple[int, int] | None:
    """Two ranks on one card, if there are such."""
    pairs = itertools.combinations(enumerate(cards.uuids), 2)
    return next(((a, b) for (a, first), (b, second) in pairs if first == second), None)


def _log(verdict: Verdict, verdicts: VerdictFile | None) -> None:
    """Say which route, why, and in which file that is kept."""
    if verdict.route is Route.PEER:
        logger.info("cards copy to each other directly (%s)", verdict.reason or "checked")
        return
    kept = f"; kept in {verdicts.path}" if verdicts is not None else ""
    logger.warning(
        "cards do not copy to each other, tensors go through host memory by %s: %s (--p2p on|off overrides%s)",
        "NCCL" if verdict.route is Route.NCCL_HOST else "qengine itself",
        verdict.reason,
        kept,
    )
