"""Full disks, limits, folders that cannot be written: one clear message, and nothing under the output's name."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import converters.safetensors_writer
from converters.convert import convert
from converters.errors import CheckpointError, WriteError
from converters.export_folder import OutputFolder, _is_mount_point, _json, discarding, replace_text, require_space
from converters.export_shards import ShardWriter
from converters.hidden_states import HiddenStates
from converters.safetensors_writer import write_safetensors
from tests.converters.test_quantize import digests, run
from tests.converters.tiny_models import tiny_folder

TENSORS = {
    "a": torch.arange(40, dtype=torch.int32),
    "b": torch.ones(3, 5).half(),
    "c": torch.zeros(0),
    "d": torch.tensor(True),
}


def test_files_are_those_of_the_library(tmp_path: Path) -> None:
    written = write_safetensors(tmp_path / "x.safetensors", TENSORS, {"format": "pt"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    data = (tmp_path / "x.safetensors").read_bytes()
    assert written.num_bytes == len(data)
    assert written.sha256 == hashlib.sha256(data).hexdigest()


def test_half_of_a_pair_is_written_as_it_was_read() -> None:
    """JSON can spell it, and UTF-8 cannot hold it."""
    for text in ("plain \u00e9", "half \ud800 \u00e9"):
        written = _json({"x": text})
        assert written.decode().endswith("\n")
        assert json.loads(written) == {"x": text}


def test_shards_and_their_index(tmp_path: Path) -> None:
    folder = OutputFolder.create(tmp_path / "out")
    shards = ShardWriter(folder, 100, {"format": "pt"})
    tensors = {f"t{i}": torch.full((10,), i, dtype=torch.float32) for i in range(5)}
    shards.add(tensors)
    shards.finish()
    folder.finish({})
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    found = {name: tensor for file in names for name, tensor in load_file(tmp_path / "out" / file).items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


# A disk that is full


class _SmallDisk(io.FileIO):
    """Files on it take so many bytes in all."""

    left = 0

    def write(self, data: Any) -> int:
        view = memoryview(data)[: type(self).left]
        type(self).left -= len(view)
        if not len(view) and len(memoryview(data)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(view)


@contextmanager
def small_disk(monkeypatch: pytest.MonkeyPatch, num_bytes: int) -> Iterator[None]:
    _SmallDisk.left = num_bytes
    with monkeypatch.context() as patched:
        patched.setattr(
            converters.safetensors_writer, "open", lambda path, mode, buffering: _SmallDisk(path, "w"), raising=False
        )
        yield


Make = Callable[[Path, Path], object]


def _convert(model: Path, out: Path) -> object:
    return convert(model, out, "dense")


def _quantize(model: Path, out: Path) -> object:
    return run(model, out, method="rtn", resume=True)


@pytest.mark.parametrize("make", [_convert, _quantize], ids=["convert", "quantize"])
@pytest.mark.parametrize("place", ["header", "middle", "last byte"])
def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make, place: str) -> None:
    model = tiny_folder(tmp_path / "model")
    before = digests(model)
    make(model, tmp_path / "whole")
    size = (tmp_path / "whole" / "model.safetensors").stat().st_size
    num_bytes = {"header": 4, "middle": size // 2, "last byte": size - 1}[place]
    with small_disk(monkeypatch, num_bytes), pytest.raises(WriteError) as caught:
        make(model, tmp_path / "out")
    message = str(caught.value)
    assert "No space left" in message
    assert "safetensors" in message
    assert "bytes" in message
    assert "\n" not in message
    assert not (tmp_path / "out").exists()
    assert digests(model) == before
    if make is _convert:
        assert not (tmp_path / "out.partial").exists()
    make(model, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_no_space_left_for_hidden_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_folder(tmp_path / "model")
    run(model, tmp_path / "whole")
    pwrite = os.pwrite

    def failing(descriptor: int, data: Any, offset: int) -> int:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("hidden-00001.bin"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", failing)
        with pytest.raises(WriteError, match=r"hidden-00001\.bin: No space left"):
            run(model, tmp_path / "out")
    run(model, tmp_path / "out", resume=True)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_the_full_device() -> None:
    with pytest.raises(WriteError, match=r"/dev/full: No space left on device after 0 of .* bytes; free some space"):
        write_safetensors(Path("/dev/full"), TENSORS, {})


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """In a process of its own: the limit cannot be taken back."""
    process = os.fork()
    if process == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
        code = 1
        try:
            write_safetensors(tmp_path / "x", TENSORS, {})
        except WriteError as error:
            code = 0 if "File too large" in str(error) and "ulimit" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


def test_too_little_space_is_said_beforehand(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"needs about .* GB, but .* has only .* GB free"):
        require_space(tmp_path / "deep" / "out", 10**18)
    assert not list(tmp_path.iterdir())


# Places that cannot be written


def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    for make in (_convert, _quantize):
        with pytest.raises(WriteError, match=r"cannot write to /proc/.*choose another place"):
            make(model, Path("/proc/out"))


@pytest.mark.parametrize("make", [_convert, _quantize], ids=["convert", "quantize"])
def test_what_exists_is_never_written_over(tmp_path: Path, make: Make) -> None:
    model = tiny_folder(tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(CheckpointError, match="exists already"):
        make(model, out)
    (out / "precious").rename(tmp_path / "file")
    with pytest.raises(CheckpointError, match="exists already"):
        make(model, tmp_path / "file")
    make(model, out)
    assert (out / "manifest.json").exists()


def test_a_foreign_folder_of_that_name_is_left_alone(tmp_path: Path) -> None:
    model, foreign = tiny_folder(tmp_path / "model"), tmp_path / "out.partial"
    foreign.mkdir()
    (foreign / "precious").write_text("x")
    for make in (_convert, _quantize):
        with pytest.raises(CheckpointError, match="move it away"):
            make(model, tmp_path / "out")
    assert (foreign / "precious").exists()


def test_a_foreign_folder_with_a_manifest_is_left_alone(tmp_path: Path) -> None:
    """Of other programs, or of ours with something added: only what the manifest lists, and all of it, is ours."""
    foreign = tmp_path / "out.partial"
    foreign.mkdir()
    (foreign / "photos.tar").write_text("x")
    line = {"photos.tar": {"bytes": 1, "sha256": ""}}
    for manifest in (
        {"name": "app"}, [], {"producer": "other", "files": line}, {"producer": "qengine:1", "files": {}},
        {"producer": "qengine:1", "files": {"photos.tar": {"bytes": 2}}}, {"producer": "qengine:1", "files": []},
        {"producer": "qengine:1", "files": {**line, "more": {"bytes": 1}}},
    ):  # fmt: skip
        (foreign / "manifest.json").write_text(json.dumps(manifest))
        for resume in (None, False, True):
            with pytest.raises(CheckpointError, match="move it away"):
                OutputFolder.create(tmp_path / "out", resume=resume)
        assert sorted(os.listdir(foreign)) == ["manifest.json", "photos.tar"]


def test_places_where_something_is_mounted(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model")
    for make in (_convert, _quantize):
        with pytest.raises(CheckpointError, match=r"/proc is a place where something is mounted.*/proc/model"):
            make(model, Path("/proc"))
    mounts = "36 35 98:0 / /mnt/with\\040space rw shared:1 - ext4 /dev/sda1 rw\n"
    assert _is_mount_point(Path("/mnt/with space"), mounts)
    assert not _is_mount_point(Path("/mnt/with"), mounts)


def test_what_cannot_be_renamed_is_kept(tmp_path: Path) -> None:
    """Of conversions too."""
    folder = OutputFolder.create(tmp_path / "out", resume=None)
    with pytest.raises(WriteError, match="only the name is missing"), discarding(folder):  # noqa: PT012
        folder.write_text("x", "content")
        (tmp_path / "out" / "other").mkdir(parents=True)
        folder.finish({"producer": "qengine:1"})
    assert sorted(os.listdir(tmp_path / "out.partial")) == ["manifest.json", "x"]
    (tmp_path / "out" / "other").rmdir()
    again = OutputFolder.create(tmp_path / "out", resume=True)
    assert again.is_complete
    again.publish()
    assert sorted(os.listdir(tmp_path / "out")) == ["manifest.json", "x"]


def test_a_manifest_is_true_at_every_moment_of_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of the card that dies between its steps leaves no line of the manifest that is not so."""
    replace, calls = os.replace, 0
    for step in range(4):
        out = tmp_path / str(step)
        folder = OutputFolder.create(out)
        folder.write_text("README.md", "old")
        folder.write_text("other", "x")
        folder.finish({"producer": "qengine:1"})
        calls = 0

        def dying(*paths: Path, step: int = step) -> None:
            nonlocal calls
            calls += 1
            if calls > step:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            replace(*paths)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", dying)
            if step < 3:
                with pytest.raises(WriteError, match="Input/output error"):
                    replace_text(out, "README.md", lambda text: f"{text} and new")
            else:
                replace_text(out, "README.md", lambda text: f"{text} and new")
        files = json.loads((out / "manifest.json").read_text())["files"]
        assert all(
            hashlib.sha256((out / name).read_bytes()).hexdigest() == line["sha256"] for name, line in files.items()
        )
        assert (out / "README.md").read_text() == ("old" if step < 2 else "old and new")
        assert ("README.md" in files) == (step in (0, 3))
        assert sorted(os.listdir(out)) == ["README.md", "manifest.json", "other"]


# Faults of the disk while a run keeps its work


def _fails(*args: object) -> None:
    raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


def test_hidden_states_that_cannot_be_kept_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WriteError, match=r"cannot write .*/no/such: No such file"):
        HiddenStates(tmp_path / "no" / "such", [(1, 2)], 4)
    states = HiddenStates(tmp_path / "x", [(1, 2)], 4)
    with pytest.raises(CheckpointError, match=r"cannot read .*the file ends at byte 0 of 32"):
        states.read(0)
    states.write(0, torch.zeros(1, 2, 4))
    with monkeypatch.context() as patched:
        patched.setattr(os, "preadv", _fails)
        with pytest.raises(CheckpointError, match=r"cannot read .*quota"):
            states.read(0)
    states.remove()


def test_a_state_that_cannot_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_folder(tmp_path / "model")
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", _fails)
        with pytest.raises(WriteError, match=r"cannot write .*state\.json: Disk quota exceeded"):
            run(model, tmp_path / "out")
    run(model, tmp_path / "out", resume=True)


def test_names_that_end_in_partial_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="unfinished work"):
        OutputFolder.create(tmp_path / "x.partial")


@pytest.mark.parametrize("name", ["with space", "ü文字", "new\nline"])
def test_odd_names(tmp_path: Path, name: str) -> None:
    _convert(tiny_folder(tmp_path / "model"), tmp_path / name)
    assert (tmp_path / name / "model.safetensors").exists()
