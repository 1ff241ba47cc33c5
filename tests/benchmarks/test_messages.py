"""The cost of messages can be measured, and a step's size does not follow the length of its sequences."""

from __future__ import annotations

from benchmarks.messages import measure


def test_a_steps_bytes_do_not_depend_on_the_context() -> None:
    short, long = measure(8, 64, 3), measure(8, 2048, 3)
    assert set(short) == set(long)
    assert all(value > 0 for value in short.values())
    # Positions and block numbers are a few bytes longer, tables are not sent again.
    assert long["step_bytes"] <= short["step_bytes"] + 8 * 8
