"""Every way in which cards fail each other is detected and named, whatever it does to the processes that look."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from qengine.parallel import peer_check
from qengine.parallel.cards import driver_version
from qengine.parallel.peer_check import Outcome, Prober, choose_route
from qengine.parallel.verdicts import SCHEMA, Cards, Route, Verdict, VerdictFile

CARDS = Cards(("GPU-aaaa", "GPU-bbbb"), "550.54.15", "2.27.3")
DEVICES = ("cpu", "cpu")
#: Longer than a check takes on a busy machine.
PATIENCE_S = 90.0


def prober(fault: str, limit_s: float = PATIENCE_S) -> Prober:
    return Prober((sys.executable, "-m", "tests.parallel.faulty_probe", fault), limit_s, PATIENCE_S)


def probe(fault: str, limit_s: float = PATIENCE_S, size: int = 2) -> Outcome:
    return prober(fault, limit_s).probe(["cpu"] * size, copies=True, variables={})


# The probe, in processes


@pytest.mark.parametrize(("fault", "size"), [("none", 3), ("noisy", 2)])
def test_cards_without_a_fault_pass(fault: str, size: int) -> None:
    assert probe(fault, size=size) == Outcome(None)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("zeros", "copies from card 0 to card 1 arrive as zeros (1 of 1 bytes are wrong)"),
        ("nothing-copied", "copies from card 0 to card 1 are wrong (1 of 1 bytes, the first at 0)"),
        ("flips-one-way", "copies from card 1 to card 0 are wrong (1 of 1 bytes, the first at 0)"),
        # 2**24 + 1 bytes, of which the first 2**20 arrive.
        ("right-if-small", "copies from card 0 to card 1 are wrong (15728641 of 16777217 bytes, the first at 1048576)"),
        ("segfaults", "the check of card 0 was ended by SIGSEGV while copying between cards"),
    ],
)
def test_a_fault_is_found_and_named(fault: str, reason: str) -> None:
    assert probe(fault) == Outcome(reason)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("killed-in-sums", "the check of card 1 was ended by SIGKILL while cards add up numbers"),
        (
            "raises",
            "the check of card 0 ended with exit code 1 while the cards connect: "
            "RuntimeError: NCCL error: unhandled system error",
        ),
        (
            "out-of-memory",
            "the check of card 0 ended with exit code 1 while copying between cards: "
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 16.00 MiB",
        ),
    ],
)
def test_what_may_be_of_the_moment_is_named_and_not_held_against_the_cards(fault: str, reason: str) -> None:
    assert probe(fault) == Outcome(reason, is_about_cards=False)


def test_a_card_whose_process_was_killed_is_named_before_those_that_miss_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_check, "_POLL_SECONDS", 3.0)  # Both have ended when they are looked at.
    reason = "the check of card 1 was ended by SIGKILL while cards add up numbers"
    assert probe("killed-in-sums") == Outcome(reason, is_about_cards=False)


def test_wrong_sums_are_found() -> None:
    fault = probe("sums-miss-a-card").fault
    assert fault is not None
    assert fault.startswith("sums over 2 cards, seen by card")
    assert "of 8192 numbers" in fault


@pytest.mark.parametrize(
    ("fault", "copies", "reason"),
    [
        ("stalls-in-copy", True, "the check of card 0 did not end within 1 s while copying between cards"),
        ("one-never-connects", False, "did not end within 1 s while the cards connect"),
    ],
)
def test_a_stall_is_ended_in_time_and_named(fault: str, copies: bool, reason: str) -> None:
    outcome = prober(fault, limit_s=1.0).probe(DEVICES, copies=copies, variables={})
    assert outcome.is_about_cards
    assert outcome.is_stall
    assert reason in (outcome.fault or "")


def test_a_check_that_cannot_start_says_nothing_of_the_cards() -> None:
    outcome = probe("never-starts")
    assert not outcome.is_about_cards
    assert "ImportError: libcudart.so is missing" in (outcome.fault or "")
    outcome = Prober(("/no/such/python",)).probe(DEVICES, copies=True, variables={})
    assert outcome == Outcome("the check cannot be started: No such file or directory", is_about_cards=False)


def test_no_process_and_no_descriptor_is_left() -> None:
    before = set(os.listdir("/proc/self/fd"))
    probe("stalls-in-copy", limit_s=0.2)
    assert set(os.listdir("/proc/self/fd")) <= before
    probes = [pid for pid in filter(str.isdigit, os.listdir("/proc")) if "stalls-in-copy" in _command_line(pid)]
    assert not probes


def _command_line(pid: str) -> str:
    try:
        return Path("/proc", pid, "cmdline").read_text()
    except OSError:
        return ""


def test_direct_copies_that_fail_lead_to_nccl_through_the_host() -> None:
    verdict = choose_route("auto", CARDS, DEVICES, prober=prober("zeros-directly"))
    assert verdict.route is Route.NCCL_HOST
    assert "arrive as zeros" in (verdict.reason or "")
    assert verdict.route.environment == {"NCCL_P2P_DISABLE": "1"}


def test_nccl_that_fails_either_way_leads_to_host_memory() -> None:
    verdict = choose_route("auto", CARDS, DEVICES, prober=prober("sums-miss-a-card"))
    assert verdict.route is Route.HOST_STAGED
    assert (verdict.reason or "").count("sums over 2 cards") == 2
    assert verdict.route.environment == {}


# What follows from outcomes


@dataclass(frozen=True)
class ScriptedProber(Prober):
    """Outcomes in order, and what was asked for."""

    outcomes: list[Outcome] = field(default_factory=list)
    asked: list[tuple[bool, str | None]] = field(default_factory=list)

    def probe(self, devices: Sequence[str], *, copies: bool, variables: Mapping[str, str]) -> Outcome:
        self.asked.append((copies, variables.get("NCCL_P2P_DISABLE")))
        return self.outcomes.pop(0)


@pytest.fixture(autouse=True)
def no_nccl_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)


def scripted(*faults: str | None) -> ScriptedProber:
    return ScriptedProber(outcomes=[Outcome(fault) for fault in faults])


def test_on_is_trusted_without_a_check(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "qengine")
    assert choose_route("on", CARDS, DEVICES, prober=scripted()).route is Route.PEER
    assert [r.getMessage() for r in caplog.records] == ["cards copy to each other directly (not checked, as told)"]


def test_off_checks_the_way_through_the_host_alone() -> None:
    asked = scripted(None)
    verdict = choose_route("off", CARDS, DEVICES, prober=asked)
    assert verdict == Verdict(Route.NCCL_HOST, "turned off by --p2p off")
    assert asked.asked == [(False, "1")]


def test_a_user_who_has_turned_it_off_for_nccl_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    verdict = choose_route("auto", CARDS, DEVICES, prober=scripted(None))
    assert verdict == Verdict(Route.NCCL_HOST, "turned off by NCCL_P2P_DISABLE")


def test_two_ranks_on_one_card_go_through_host_memory() -> None:
    cards = Cards(("GPU-a", "GPU-b", "GPU-a"), "550")
    verdict = choose_route("auto", cards, ("cuda:0", "cuda:1", "cuda:0"), prober=scripted())
    assert verdict == Verdict(Route.HOST_STAGED, "ranks 0 and 2 share one card")


def test_a_fault_is_one_clear_line(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    file = VerdictFile(tmp_path / "verdicts.json")
    choose_route("auto", CARDS, DEVICES, verdicts=file, prober=scripted("copies arrive as zeros", None))
    assert [(r.levelno, r.getMessage()) for r in caplog.records] == [
        (
            logging.WARNING,
            "cards do not copy to each other, tensors go through host memory by NCCL: copies arrive as zeros "
            f"(--p2p on|off overrides; kept in {file.path})",
        )
    ]


# What is kept


def test_a_verdict_is_kept_for_these_cards_and_this_driver(tmp_path: Path) -> None:
    file = VerdictFile(tmp_path / "cache" / "verdicts.json")
    first = choose_route("auto", CARDS, DEVICES, verdicts=file, prober=scripted("zeros", None))
    assert choose_route("auto", CARDS, DEVICES, verdicts=file, prober=scripted()) == first
    for others in (
        replace(CARDS, driver="560.1"),
        replace(CARDS, nccl="2.28.1"),
        replace(CARDS, uuids=CARDS.uuids[::-1]),
        Cards(("x", "y"), "1"),
    ):
        asked = scripted(None)
        assert choose_route("auto", others, DEVICES, verdicts=file, prober=asked).route is Route.PEER
        assert asked.asked == [(True, None)]
    assert choose_route("auto", CARDS, DEVICES, verdicts=file, prober=scripted()) == first
    assert os.listdir(file.path.parent) == [file.path.name], "nothing but the file itself is left"


def test_off_and_auto_are_kept_apart(tmp_path: Path) -> None:
    file = VerdictFile(tmp_path / "verdicts.json")
    assert choose_route("off", CARDS, DEVICES, verdicts=file, prober=scripted(None)).route is Route.NCCL_HOST
    assert choose_route("auto", CARDS, DEVICES, verdicts=file, prober=scripted(None)).route is Route.PEER
    assert choose_route("off", CARDS, DEVICES, verdicts=file, prober=scripted()).route is Route.NCCL_HOST


def test_a_check_that_did_not_start_is_not_kept(tmp_path: Path) -> None:
    file = VerdictFile(tmp_path / "verdicts.json")
    failed = ScriptedProber(outcomes=[Outcome("no torch", is_about_cards=False)] * 2)
    assert choose_route("auto", CARDS, DEVICES, verdicts=file, prober=failed).route is Route.HOST_STAGED
    assert not file.path.exists()


STALL = Outcome("no end within 10 s", is_stall=True)


@pytest.mark.parametrize(
    ("outcomes", "route", "is_kept"),
    [
        # The way through the host was in time: it is the cards that stall.
        ([STALL, Outcome(None)], Route.NCCL_HOST, True),
        ([STALL, STALL], Route.HOST_STAGED, False),
        ([Outcome("zeros"), STALL], Route.HOST_STAGED, False),
        ([Outcome("zeros"), Outcome("wrong sums")], Route.HOST_STAGED, True),
        ([Outcome("no memory", is_about_cards=False), Outcome(None)], Route.NCCL_HOST, False),
    ],
)
def test_what_may_be_of_the_moment_is_not_kept(
    outcomes: list[Outcome], route: Route, is_kept: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = VerdictFile(tmp_path / "verdicts.json")
    verdict = choose_route("auto", CARDS, DEVICES, verdicts=file, prober=ScriptedProber(outcomes=list(outcomes)))
    assert verdict.route is route
    assert (file.find(CARDS, peers_allowed=True) == verdict) is is_kept
    assert ("kept in" in caplog.text) is is_kept


_KEY = "GPU-aaaa, GPU-bbbb; driver 550.54.15; NCCL 2.27.3"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"[" * 100_000,
        b'{"schema": 99, "verdicts": {}}',
        json.dumps({"schema": SCHEMA, "verdicts": []}).encode(),
        json.dumps({"schema": SCHEMA, "verdicts": {_KEY: {"route": "teleport", "reason": None}}}).encode(),
        json.dumps({"schema": SCHEMA, "verdicts": {_KEY: {"route": "peer"}}}).encode(),
        json.dumps({"schema": SCHEMA, "verdicts": {_KEY: {"route": "peer", "reason": [1]}}}).encode(),
        json.dumps({"schema": SCHEMA, "verdicts": {_KEY: "peer"}}).encode(),
        b" " * (2**20 + 1),
    ],
    ids=lambda content: repr(content[:24]),
)
def test_a_broken_file_is_passed_over_and_written_anew(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = VerdictFile(tmp_path / "verdicts.json")
    file.path.write_bytes(content)
    asked = scripted("zeros", None)
    verdict = choose_route("auto", CARDS, DEVICES, verdicts=file, prober=asked)
    assert len(asked.asked) == 2, "the cards are checked again"
    assert any("checked again" in record.getMessage() for record in caplog.records)
    assert file.find(CARDS, peers_allowed=True) == verdict


def test_a_folder_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    file = VerdictFile(tmp_path / "cache" / "verdicts.json")
    assert choose_route("auto", CARDS, DEVICES, verdicts=file, prober=scripted(None)).route is Route.PEER
    assert any("cannot be written" in record.getMessage() for record in caplog.records)


def test_the_file_lies_in_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QENGINE_CACHE_DIR", str(tmp_path))
    assert VerdictFile.default().path == tmp_path / "peer-check.json"
    monkeypatch.delenv("QENGINE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert VerdictFile.default().path == Path("/somewhere/qengine/peer-check.json")


def test_the_driver_says_its_version(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert driver_version(file) == "unknown"
    file.write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 2023\nGCC version: 12.2.0\n"
    )
    assert driver_version(file) == "535.104.05"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65  Release Build\n")
    assert driver_version(file) == "580.65"
    file.write_text("nothing of the kind")
    assert driver_version(file) == "unknown"
