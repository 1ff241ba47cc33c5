"""The files of deploy/, checked against each other and against the program, without starting anything."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from qengine.commands.parsing import parse
from qengine.serving.options import ServerOptions

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
SYSTEMD_ANALYZE = shutil.which("systemd-analyze")


def instructions(name: str) -> list[str]:
    """The arguments of every such instruction of the Dockerfile; continued lines are joined."""
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.split(maxsplit=1)[1] for line in joined.splitlines() if line.split(" ")[0] == name]


def read_yaml(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text(encoding="utf-8"))


def seconds(text: str) -> float:
    assert re.fullmatch(r"\d+s?", text)
    return float(text.rstrip("s"))


# Dockerfile


def test_everything_it_copies_exists_and_is_sent_to_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "**"  # Nothing but what is named after it.
    copied = [source for arguments in instructions("COPY") for source in arguments.split()[:-1]]
    assert len(copied) >= 6
    for source in copied:
        assert (ROOT / source).exists(), f"there is no {source}"
        assert f"!{source}" in ignored, f".dockerignore keeps {source} from the builder"


def test_it_copies_all_that_the_package_is_made_of() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    copied = " ".join(instructions("COPY")).split()
    packages = re.search(r"include = \[(.*)\]", project)
    assert packages is not None
    for pattern in re.findall(r'"([a-z_]+)\*"', packages[1]):
        assert pattern in copied
    for name in (*re.findall(r'^readme = "(.*)"', project, re.MULTILINE), "LICENSE"):
        assert name in copied
    assert 'qengine = "qengine.__main__:main"' in project
    assert instructions("ENTRYPOINT") == ['["qengine"]']


def test_the_bundled_model_is_the_makefiles() -> None:
    bundled = re.search(r"BUNDLED_MODEL := (\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert bundled is not None
    assert f'"{bundled[1]}"' in DOCKERFILE


def test_it_does_not_run_as_root_and_its_command_is_one() -> None:
    assert instructions("USER") == ["qengine"]
    assert DOCKERFILE.index("USER qengine") > DOCKERFILE.rindex("RUN pip")
    [command] = instructions("CMD")
    parse("serve", yaml.safe_load(command)[1:])
    assert f"127.0.0.1:{ServerOptions().port}/health" in DOCKERFILE
    assert instructions("EXPOSE") == [str(ServerOptions().port)]


# compose


def test_compose_names_only_what_there_is() -> None:
    compose = read_yaml("compose.yaml")
    services = compose["services"]
    for service in services.values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), f"there is no {source}"
            else:
                assert source in compose["volumes"]
        assert set(service.get("secrets", ())) <= set(compose["secrets"])
        assert set(service.get("depends_on", ())) <= set(services)
        assert "image" in service or (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).exists()
        for address in service["ports"]:
            assert address.startswith("127.0.0.1:"), "only this machine may connect unless the owner changes it"
    assert set(read_yaml("compose.gpu.yaml")["services"]) <= set(services)


def test_the_key_is_no_part_of_the_repository() -> None:
    assert "/deploy/api_key" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert read_yaml("compose.yaml")["secrets"]["api_key"]["file"] == "./api_key"


def test_the_servers_command_is_one_and_has_time_to_drain() -> None:
    service = read_yaml("compose.yaml")["services"]["qengine"]
    words = service["command"]
    assert words[0] == "serve"
    options = parse("serve", words[1:]).options
    assert options["api_key_file"] == "/run/secrets/api_key"
    assert seconds(service["stop_grace_period"]) > ServerOptions().drain_timeout


def test_prometheus_and_grafana_find_each_other() -> None:
    services = read_yaml("compose.yaml")["services"]
    [job] = read_yaml("prometheus.yaml")["scrape_configs"]
    [target] = job["static_configs"][0]["targets"]
    name, port = target.split(":")
    assert name in services
    assert int(port) == ServerOptions().port
    assert job["authorization"]["credentials_file"] == "/run/secrets/api_key"
    mounted = [volume.split(":") for volume in services["prometheus"]["volumes"]]
    config = next(word for word in services["prometheus"]["command"] if word.startswith("--config.file="))
    assert config.split("=")[1] in [target for _, target, *_ in mounted]
    [source] = read_yaml("grafana/provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = read_yaml("grafana/provisioning/dashboards/qengine.yaml")["providers"]
    boards = [volume.split(":")[1] for volume in services["grafana"]["volumes"] if "overview.json" in volume]
    assert boards == [f"{provider['options']['path']}/overview.json"]


# systemd


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((DEPLOY / "qengine.service").read_text(encoding="utf-8"))
    return parser


def test_the_units_command_is_one_and_has_time_to_drain() -> None:
    service = unit()["Service"]
    words = shlex.split(service["ExecStart"])
    assert words[0].endswith("/qengine")
    assert words[1:4] == ["serve", "--config", "/etc/qengine/serve.yaml"]
    assert parse("serve", words[4:]).options["api_key_file"] == "%d/api_key"
    assert service["LoadCredential"].split(":")[0] == "api_key"
    assert seconds(service["TimeoutStopSec"]) > ServerOptions().drain_timeout


@pytest.mark.skipif(SYSTEMD_ANALYZE is None, reason="systemd is not installed")
def test_systemd_understands_the_unit_and_finds_it_safe(tmp_path: Path) -> None:
    text = (DEPLOY / "qengine.service").read_text(encoding="utf-8")
    copy = tmp_path / "qengine.service"
    copy.write_text(text.replace("/opt/qengine/.venv/bin/qengine", shutil.which("true") or "/bin/true"))
    assert SYSTEMD_ANALYZE is not None
    verified = subprocess.run([SYSTEMD_ANALYZE, "verify", copy], capture_output=True, text=True, timeout=60)
    # Without its manager running, systemd may speak of itself; what it says of the unit names the file.
    assert not [line for line in verified.stderr.splitlines() if "qengine.service" in line], verified.stderr
    rated = subprocess.run(
        [SYSTEMD_ANALYZE, "security", "--offline=true", "--threshold=25", copy],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert rated.returncode == 0, rated.stdout[-200:]
