"""Rules by module: what matches what, and patterns made to take for ever, one by one and all together."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.errors import CheckpointError
from converters.module_rules import MAX_WAYS, DynamicRule, ModuleRules, Part, Pattern, require_short
from converters.source import LinearSlot, Slot
from tests.converters.folders import compressed_config, gptq_config, refusal, write_folder

NAME = "model.layers.100.self_attn.q_proj"
#: What 126 layers have: the largest dense model that is published.
MODULES = [
    f"model.layers.{layer}.{linear}"
    for layer in range(126)
    for linear in (
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    )
]


def compiled(text: str) -> Pattern:
    return Pattern.compile(text, "here")


#: Patterns as published configs have them.
USUAL = (
    "lm_head",
    r".*moe.*",
    r".*\.18\..*gate.*",
    r".*\.(?:15)\..*",
    r"^model\.layers\.\d+\.mlp\.(gate|up)_proj$",
    r"^(?!.*mlp).*",
    r".*[qkv]_proj",
    r"model\.layers\.[0-9]{1,2}\.self_attn\..*",
    r".*\.layers\.([1-9]|1[0-9])\.mlp\..*",
    r"model\.layers\.(" + "|".join(map(str, range(60))) + r")\.mlp\.down_proj",
    r"(?P<kind>.*)_proj",
)


@pytest.mark.parametrize("text", USUAL)
def test_usual_patterns_match_as_python_says(text: str) -> None:
    pattern = compiled(text)
    for name in MODULES[::41]:
        assert pattern.matches(name) == bool(re.match(text, name))


def test_usual_patterns_are_not_too_costly_together() -> None:
    rules = ModuleRules([DynamicRule(compiled(text), bits=8) for text in USUAL], "here")
    assert any(rules.first(name) for name in MODULES)


def test_a_rule_for_each_module_of_a_large_model() -> None:
    rules = ModuleRules([DynamicRule(compiled(re.escape(name)), bits=n) for n, name in enumerate(MODULES)], "here")
    require_short(map(re.escape, MODULES), "here")
    found = [rules.first(name) for name in MODULES]
    assert [rule and rule.bits for rule in found] == list(range(len(MODULES)))


def test_the_first_rule_that_matches_counts() -> None:
    rules = ModuleRules(
        [
            DynamicRule("b", bits=1),
            DynamicRule(compiled("a"), bits=2),
            DynamicRule("a1", bits=3),
            DynamicRule(Part("c"), bits=4),
            DynamicRule("b", bits=5),
            DynamicRule(compiled(""), bits=6),
            DynamicRule("d", bits=7),
        ]
    )
    found = {name: rules.first(name) for name in ("b", "a1", "xcx", "d", "bb", "b")}
    assert {name: rule and rule.bits for name, rule in found.items()} == {"b": 1, "a1": 2, "xcx": 4, "d": 6, "bb": 6}
    assert ModuleRules().first("a") is None


#: Each takes seconds to years of a matcher that tries every way.
COSTLY = (
    ".*" * 9 + "!",
    ".?" * 30 + "!",
    "(.?.?.?)" * 20 + "x",
    "(?:|)" * 40 + "!",
    "(|a)" * 40 + "!",
    "(?:a|b||c)" * 20 + "!",
    "(?:(?:(?:|)(?:|)(?:|))?(?:|)(?:|)(?:|)(?:|)(?:|)(?:|))?" * 4 + "(?:|)" * 4 + "!",
    "(?=" + "(?:|)" * 40 + "!)",
    "(?:a*)*!",
    "(a+)+!",
    "(a|a){30}!",
    "(?:.*){9}!",
    "a{(|)(|)" + "(|)" * 40 + "!",
    "[(|)](|)" + "(|)" * 40 + "!",
    r"\((|)" + "(|)" * 40 + "!",
    "a??" * 40 + "!",
    "." + "{0,9}".join("." * 12) + "!",
)
#: What is not counted is not read: flags, comments in which brackets mean nothing, escapes that no name needs.
NOT_READ = (
    "(?i)a",
    "(?i:a)",
    "(?x)a # [\n" + "(|)" * 40,
    "(?#[)" + "(|)" * 40,
    "(?(1)a|b)",
    r"[\u0100-\uffff]",
    r"\N{BULLET}",
    r"\x41",
    "ä",
    "a" * 257,
)
BROKEN = ("(", ")", "a)", "[", "*", "a**", "(?P<a>x)(?P<a>y)", "\\", r"\9", "(" * 250, "(?<=a*)b", "a{2,1}")


@pytest.mark.parametrize("text", COSTLY + NOT_READ + BROKEN, ids=lambda text: ascii(text[:30]))
def test_patterns_that_are_refused(text: str) -> None:
    started = time.process_time()
    with pytest.raises(CheckpointError, match="here"):
        compiled(text)
    assert time.process_time() - started < 0.5


#: Each of them is allowed; it is their number that takes a quarter of an hour.
TOGETHER = [f".*.*.*.*.*.*!{n}" for n in range(4096)]
PREFIX = "model.layers.0.self_attn."


def hostile(tmp_path: Path, config: dict[str, Any]) -> str:
    """What a model of one quantized layer answers."""
    parts = {
        "qweight": torch.zeros(8, 32, dtype=torch.int32),
        "scales": torch.ones(2, 32).half(),
        "qzeros": torch.zeros(2, 4, dtype=torch.int32),
    }
    names = [PREFIX + part for part in ("q_proj", "k_proj", "v_proj", "o_proj")]
    slots: list[Slot] = [LinearSlot(name, 64, 32) for name in names]
    tensors = {f"{name}.{part}": tensor.clone() for name in names for part, tensor in parts.items()}
    write_folder(tmp_path, tensors, config)
    return refusal(tmp_path, slots)


def test_many_patterns_together_are_refused(tmp_path: Path) -> None:
    started = time.process_time()
    assert "too costly" in hostile(tmp_path, gptq_config(group_size=32, dynamic={f"-:{p}": {} for p in TOGETHER}))
    assert time.process_time() - started < 5


@pytest.mark.parametrize("key", ["ignore", "targets"])
def test_many_patterns_of_compressed_tensors_are_refused(tmp_path: Path, key: str) -> None:
    config = compressed_config()
    patterns = [f"re:{pattern}" for pattern in TOGETHER]
    if key == "ignore":
        config["ignore"] = patterns
    else:
        config["config_groups"]["group_0"]["targets"] = patterns
    write_folder(tmp_path, {f"{PREFIX}q_proj.weight_packed": torch.zeros(32, 8, dtype=torch.int32)}, config)
    started = time.process_time()
    assert "too costly" in refusal(tmp_path, [LinearSlot(f"{PREFIX}q_proj", 64, 32)])
    assert time.process_time() - started < 5


def test_rules_that_are_cheap_alone_are_bounded_by_the_modules_asked_for() -> None:
    """A config may declare thousands of layers, none of which need exist."""
    rules = ModuleRules([DynamicRule(Part(f"x{n}"), skip=True) for n in range(4096)], "here")
    most = MAX_WAYS // (4096 * 20)
    for layer in range(most):
        rules.first(f"model.layers.{layer}.mlp.up_proj")
    with pytest.raises(CheckpointError, match=r"here.*too costly"):
        rules.first(f"model.layers.{most}.mlp.up_proj")


def test_asking_again_costs_nothing() -> None:
    rules = ModuleRules([DynamicRule(compiled(".*.*.*.*!"), skip=True)] * 20, "here")
    for _ in range(10_000):
        assert rules.first(NAME) is None


def test_patterns_that_take_long_to_compile_are_refused(tmp_path: Path) -> None:
    long = {"(a|b)" * 50 + str(n): {} for n in range(4000)}
    started = time.process_time()
    assert "characters" in hostile(tmp_path, gptq_config(group_size=32, dynamic=long))
    assert time.process_time() - started < 2
