"""OwnWords: errors about fields in the words of the API that the client speaks, where chat found them by its own.

Invariant: status, code and headers stay as they are. It knows no API; those who read requests into chat's do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from qengine.errors import QEngineError
from qengine.serving.errors import ApiError, as_api_error

#: What chat calls a field -> what it is called here.
Names = Sequence[tuple[str, str]]


class OwnWords:
    """The words of one API.

    Args:
        names: of fields, the longer ones first, as some are parts of others. The first that is in the field which an
            error names is changed there and in its message.
        in_messages: names that mean nothing else, wherever a message has them.
    """

    def __init__(self, names: Names, in_messages: Names = ()) -> None:
        self._names = names
        self._in_messages = in_messages

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Have errors name the fields as they are called here."""
        try:
            yield
        except QEngineError as error:
            raise self.renamed(error) from error

    def renamed(self, error: BaseException) -> ApiError:
        """The answer for any exception, with fields as they are called here."""
        found = as_api_error(error)
        message, param = str(found), found.param
        for theirs, ours in self._in_messages:
            message = message.replace(theirs, ours)
        for theirs, ours in self._names:
            if param is not None and theirs in param:
                message, param = message.replace(theirs, ours), param.replace(theirs, ours)
                break
        return ApiError(found.status, message, param=param, code=found.code, headers=found.headers)
