"""Whatever happens to the bytes of a checkpoint, it is read, or refused with the one error of the package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from converters.errors import CheckpointError
from converters.source import LinearSlot, Slot, TensorSlot
from tests.converters.folders import MODULE, awq_config, gptq_config, open_checked, slot_of, write_folder
from tests.converters.gguf_files import write_gguf
from tests.converters.reading import outcome
from tests.converters.reference import awq_tensors, gptq_tensors, random_linear

FILE = "model.safetensors"
NORM = "model.norm.weight"
LINEAR = random_linear(64, 32, 32)
UP = "model.layers.0.mlp.up_proj"

bounded = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

Edit = tuple[str, float, bytes]
#: Numbers that break arithmetic, as the eight bytes of a length, a count or an offset.
EXTREMES = [n.to_bytes(8, "little") for n in (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)]
edits = st.lists(
    st.tuples(
        st.sampled_from(["overwrite", "insert", "delete", "cut"]),
        # Half of the edits fall into the first quarter, where the headers are.
        st.one_of(st.floats(0, 0.25), st.floats(0, 1)),
        st.one_of(
            st.binary(min_size=1, max_size=4), st.sampled_from(EXTREMES), st.sampled_from([b'"', b"}", b"-", b"9"])
        ),
    ),
    min_size=1,
    max_size=4,
)


def mutate(content: bytes, changes: list[Edit], start: int = 0) -> bytes:
    """The content after these edits; places are fractions of what lies between `start` and the end."""
    data = bytearray(content)
    for kind, place, new in changes:
        at = start + int(place * max(0, len(data) - start))
        if kind == "overwrite":
            data[at : at + len(new)] = new
        elif kind == "insert":
            data[at:at] = new
        elif kind == "delete":
            del data[at : at + len(new)]
        elif at > start:
            del data[at:]
    return bytes(data)


# Safetensors


@pytest.fixture(scope="module")
def gptq_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    linear = LINEAR.with_groups(np.random.default_rng(0).permutation(LINEAR.groups))
    tensors = {**gptq_tensors(MODULE, linear), f"{UP}.weight": torch.ones(8, 64), NORM: torch.ones(8)}
    config = gptq_config(group_size=32, desc_act=True, dynamic={"-:.*up_proj": {}, ".*down": {"bits": 4}})
    return write_folder(tmp_path_factory.mktemp("gptq"), tensors, config)


@pytest.fixture(scope="module")
def awq_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {**awq_tensors(MODULE, LINEAR), f"{UP}.weight": torch.ones(8, 64), NORM: torch.ones(8)}
    config = awq_config(32, modules_to_not_convert=["up_proj"])
    return write_folder(tmp_path_factory.mktemp("awq"), tensors, config)


SLOTS: list[Slot] = [slot_of(LINEAR), LinearSlot(UP, 64, 8), TensorSlot(NORM, (8,))]


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    def of(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name, dirs_exist_ok=True))

    return of


@given(changes=edits)
@bounded
def test_bytes_of_gptq_weights(gptq_folder: Path, copy: Callable[[Path], Path], changes: list[Edit]) -> None:
    folder = copy(gptq_folder)
    (folder / FILE).write_bytes(mutate((folder / FILE).read_bytes(), changes))
    assert outcome(folder, SLOTS) != ""


@given(changes=edits)
@bounded
def test_bytes_of_gptq_data(gptq_folder: Path, copy: Callable[[Path], Path], changes: list[Edit]) -> None:
    """The header stays sound, and so does the length: only words, scales and group numbers change."""
    folder = copy(gptq_folder)
    content = (folder / FILE).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    in_place = [("overwrite", place, new) for _, place, new in changes]
    mutated = mutate(content, in_place, start)[: len(content)]
    (folder / FILE).write_bytes(mutated)
    assert outcome(folder, SLOTS) != ""


@given(changes=edits)
@bounded
def test_bytes_of_a_config(awq_folder: Path, copy: Callable[[Path], Path], changes: list[Edit]) -> None:
    folder = copy(awq_folder)
    (folder / "config.json").write_bytes(mutate((folder / "config.json").read_bytes(), changes))
    assert outcome(folder, SLOTS) != ""


json_values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from([0, 1, -1, 3, 4, 32, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e308]),
        st.sampled_from(
            ["", "4", "-1", "gptq", "awq", "gptq_v2", "marlin", "F16", "F64", "I32", "U8", "BF16", "(", ".*"]
        ),
        st.text(max_size=5),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["bits", "sym", "a", ".*"]), inner, max_size=3)
    ),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> None:
    for key in path[:-1]:
        value = value[key]
    value[path[-1]] = new


@pytest.mark.parametrize("method", ["gptq", "awq"])
@given(data=st.data())
@bounded
def test_values_of_a_config(
    gptq_folder: Path, awq_folder: Path, copy: Callable[[Path], Path], method: str, data: st.DataObject
) -> None:
    folder = copy(gptq_folder if method == "gptq" else awq_folder)
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    quantization.update(dict.fromkeys(("version", "backend", "meta", "pack_dtype", "is_marlin_format", "format")))
    put(config, data.draw(st.sampled_from(sorted(places(config), key=str))), data.draw(json_values))
    (folder / "config.json").write_text(json.dumps(config))
    assert outcome(folder, SLOTS) != ""


@given(data=st.data())
@bounded
def test_values_of_a_header(gptq_folder: Path, copy: Callable[[Path], Path], data: st.DataObject) -> None:
    folder = copy(gptq_folder)
    content = (folder / FILE).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    put(header, data.draw(st.sampled_from(sorted(places(header), key=str))), data.draw(json_values))
    body = json.dumps(header).encode()
    (folder / FILE).write_bytes(len(body).to_bytes(8, "little") + body + content[end:])
    assert outcome(folder, SLOTS) != ""


def near(*sizes: int) -> st.SearchStrategy[int]:
    """These sizes, and some that fill no words and no groups."""
    return st.sampled_from([*sizes, *sizes, 1, 4, 7, 20, 24, 33])


@st.composite
def linears(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], LinearSlot]:
    """Tensors whose shapes fit each other often, but not always, and what a model wants of them."""
    wanted = draw(near(32, 48, 64, 96)), draw(near(16, 32, 64))
    rows, columns = draw(st.one_of(st.just(wanted), st.tuples(near(32, 64), near(16, 32))))
    bits, groups = draw(st.sampled_from([2, 3, 4, 5, 8])), draw(near(0, 1, 2, 3))
    packed_down = draw(st.booleans())
    words = (rows * bits // 32, columns) if packed_down else (rows, columns * bits // 32)
    kind = draw(st.sampled_from([torch.int32] * 6 + [torch.int64, torch.uint8]))
    tensors = {
        f"{MODULE}.qweight": torch.zeros(words, dtype=kind),
        f"{MODULE}.scales": torch.ones(groups, columns, dtype=torch.float16),
        f"{MODULE}.qzeros": torch.zeros(groups, columns * bits // 32, dtype=torch.int32),
        f"{MODULE}.g_idx": torch.arange(rows, dtype=torch.int32) % max(1, groups),
        f"{MODULE}.bias": torch.ones(columns),
    }
    left_out = draw(st.sets(st.sampled_from(sorted(tensors)), max_size=3))
    slot = LinearSlot(MODULE, *wanted, has_bias=draw(st.booleans()))
    return {name: tensor for name, tensor in tensors.items() if name not in left_out}, slot


@pytest.mark.parametrize("method", ["gptq", "awq"])
@given(linear=linears(), group_size=st.sampled_from([-1, 16, 32, 48]), sym=st.booleans())
@bounded
def test_what_passes_the_check_can_be_read(
    tmp_path: Path, method: str, linear: tuple[dict[str, torch.Tensor], LinearSlot], group_size: int, sym: bool
) -> None:
    tensors, slot = linear
    config = gptq_config(4, group_size, sym=sym) if method == "gptq" else awq_config(group_size, zero_point=not sym)
    write_folder(tmp_path, tensors, config)
    try:
        source = open_checked(tmp_path, [slot])
    except CheckpointError:
        return
    source.read_linear(slot)


# GGUF


Q_PROJ = "model.layers.0.self_attn.q_proj"
GGUF_SLOTS: list[Slot] = [
    LinearSlot(MODULE, 32, 8),
    LinearSlot(Q_PROJ, 32, 32),
    TensorSlot("model.norm.weight", (32,)),
    TensorSlot("model.embed_tokens.weight", (4, 32)),
]


@pytest.fixture(scope="module")
def gguf_content(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    rng = np.random.default_rng(0)
    halves = rng.normal(size=(32, 2)).astype("<f2").view(np.uint8)
    nibbles = rng.integers(0, 256, (32, 16), dtype=np.uint8)
    q4_1 = np.concatenate([halves, nibbles], axis=1)
    tensors = {
        "blk.0.ffn_down.weight": (np.delete(q4_1, [2, 3], axis=1)[:8], GGMLQuantizationType.Q4_0),
        "blk.0.attn_q.weight": (q4_1, GGMLQuantizationType.Q4_1),
        "output_norm.weight": (np.ones(32, np.float32), GGMLQuantizationType.F32),
        "token_embd.weight": (np.ones((4, 32), np.float16), GGMLQuantizationType.F16),
        "rope_freqs.weight": (np.ones(8, np.float32), GGMLQuantizationType.F32),
    }
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    more = {"general.alignment": 32, "tokenizer.ggml.bos_token_id": 1}
    write_gguf(path, tensors, heads=2, kv_heads=1, hidden=32, more=more)
    return path.read_bytes()


def test_the_gguf_file_is_sound(tmp_path: Path, gguf_content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(gguf_content)
    assert outcome(tmp_path / "m.gguf", GGUF_SLOTS) is None


def test_the_folders_are_sound(gptq_folder: Path, awq_folder: Path) -> None:
    assert outcome(gptq_folder, SLOTS) is None
    assert outcome(awq_folder, SLOTS) is None


@given(changes=edits)
@bounded
def test_bytes_of_gguf(tmp_path: Path, gguf_content: bytes, changes: list[Edit]) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(mutate(gguf_content, changes))
    assert outcome(path, GGUF_SLOTS) != ""


@given(
    changes=st.lists(
        st.tuples(
            st.just("overwrite"),
            st.floats(0, 0.5),
            st.one_of(st.binary(min_size=1, max_size=2), st.sampled_from(EXTREMES)),
        ),
        min_size=1,
        max_size=2,
    )
)
@bounded
def test_bytes_of_a_gguf_head(tmp_path: Path, gguf_content: bytes, changes: list[Edit]) -> None:
    """Nothing moves, so that the damage reaches values that are parsed late."""
    path = tmp_path / "m.gguf"
    path.write_bytes(mutate(gguf_content, changes)[: len(gguf_content)])
    assert outcome(path, GGUF_SLOTS) != ""
