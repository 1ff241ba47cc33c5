"""What `quantize` and `convert` share: finding the model, and the errors of writing a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from converters.errors import CheckpointError, WriteError
from converters.quantizers import QuantizationError
from qengine.config import LoadConfig
from qengine.errors import LoadError, QEngineError
from qengine.runtime.locate import ModelLocation, locate_model


def find_model(model: str | None) -> ModelLocation:
    """A model on this disk; None is the bundled one. Raises LoadError."""
    return locate_model(LoadConfig(model=model))


@contextmanager
def making_errors() -> Iterator[None]:
    """What a file or a request got wrong as a LoadError (exit code 2), what failed on the way as a QEngineError (1)."""
    try:
        yield
    except CheckpointError as error:
        raise LoadError(str(error)) from error
    except (WriteError, QuantizationError) as error:
        raise QEngineError(str(error)) from error
