"""Where ranks of one machine find each other: a file in memory that they inherit, so that no port is opened for it.

It has no name: nothing is left in a file system, whoever is killed, and nobody else can write to it. Invariant: what
one name's ranks leave there is not seen by those of another name. It connects nobody: see `distributed.connect`.

    with meeting_file() as fd:
        for _ in range(num_ranks):
            subprocess.Popen([*command, inherited_path(fd)], pass_fds=[fd])
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import FileStore, PrefixStore  # type: ignore[attr-defined]  # public, not marked as such
from torch.distributed.distributed_c10d import Store

from qengine.errors import TransportError


@contextmanager
def meeting_file() -> Iterator[int]:
    """The descriptor of an empty file for ranks to inherit; leaving the block closes this process's copy.

    Raises:
        TransportError: the system refuses.
    """
    try:
        fd = os.memfd_create("qengine-rendezvous")
    except OSError as error:
        raise TransportError(f"ranks have no file to meet in: {error.strerror or error}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def inherited_path(fd: int) -> str:
    """By which whoever has inherited `fd` opens it."""
    return f"/proc/self/fd/{fd}"


class Rendezvous:
    """The same for all of `num_ranks` ranks.

    Args:
        path: of a file that is empty, or does not exist, before they come.
    """

    def __init__(self, path: str, num_ranks: int) -> None:
        self._store = FileStore(path, num_ranks)

    def place(self, name: str) -> Store:
        """Where the ranks of one group meet."""
        store: Store = PrefixStore(name, self._store)
        return store
