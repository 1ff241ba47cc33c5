"""Calibration texts of a dataset on the hub: one .jsonl or .txt file of it, downloaded into the hub's cache.

It does not read parquet, which most datasets are stored in: that takes a package of 40 MB for what two lines convert.
"""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download

from converters.errors import CheckpointError
from converters.files import shown

_SUFFIXES = (".jsonl", ".txt")
_CONVERSION = (
    'python -c "from datasets import load_dataset; '
    "load_dataset('{repository}', split='train[:1000]').to_json('texts.jsonl')\""
)


def fetch_from_hub(repository: str, name: str | None) -> Path:
    """The file `name` of a dataset, or its one .jsonl or .txt file, on this disk.

    With several, those of a "train" split go first, then the first by name.

    Raises:
        CheckpointError: there is no such dataset or file, no network, or nothing that can be read.
    """
    if name is None:
        name = _choose(repository, _listed(repository))
    try:
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except Exception as error:
        raise _unreachable(f"{repository}:{name}", error) from error


def _listed(repository: str) -> list[str]:
    try:
        return sorted(HfApi().list_repo_files(repository, repo_type="dataset"))
    except Exception as error:
        raise _unreachable(repository, error) from error


def _choose(repository: str, names: list[str]) -> str:
    readable = [name for suffix in _SUFFIXES for name in names if name.endswith(suffix)]
    readable.sort(key=lambda name: "train" not in name)
    if not readable:
        found = ", ".join(sorted({Path(name).suffix or name for name in names})[:8]) or "nothing"
        conversion = _CONVERSION.format(repository=repository)
        raise CheckpointError(
            f"the dataset '{repository}' has no .jsonl or .txt file (it has: {shown(found)}); make one with the "
            f"package datasets and give that: {conversion}"
        )
    return readable[0]


def _unreachable(what: str, error: Exception) -> CheckpointError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
    return CheckpointError(
        f"calibration texts '{shown(what)}' are neither a file on this machine nor to be had from the hub: "
        f"{shown(reason)}. Check the name and the network, or calibrate with 'builtin' or a local .txt or .jsonl file"
    )
