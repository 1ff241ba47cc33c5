"""What `quantize` and `convert` share: finding the model, and the errors of writing a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converters.errors import CheckpointError, WriteError
from converters.quantize_identity import model_name
from converters.quantizers import QuantizationError
from qengine.config import LoadConfig
from qengine.errors import LoadError, QEngineError
from qengine.runtime.locate import ModelLocation, locate_model


def find_model(model: str | None) -> ModelLocation:
    """A model on this disk; None is the bundled one. Raises LoadError."""
    return locate_model(LoadConfig(model=model))


def shown_name(location: ModelLocation) -> str:
    """What a model is called in a card: its folder or file, or the last part of its hub id."""
    is_local = Path(location.name).expanduser() == location.path
    return model_name(location.path) if is_local else location.name.rpartition("/")[2]


@contextmanager
def making_errors() -> Iterator[None]:
    """What a file or a request got wrong as a LoadError (exit code 2), what failed on the way as a QEngineError (1)."""
    try:
        yield
    except CheckpointError as error:
        raise LoadError(str(error)) from error
    except (WriteError, QuantizationError) as error:
        raise QEngineError(str(error)) from error
