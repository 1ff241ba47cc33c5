"""Where ranks of one machine find each other: a file, so that no port is opened for it.

Invariant: what one name's ranks leave there is not seen by those of another name. It connects nobody: see
`distributed.connect`.
"""

from __future__ import annotations

from torch.distributed import FileStore, PrefixStore  # type: ignore[attr-defined]  # public, not marked as such
from torch.distributed.distributed_c10d import Store


class Rendezvous:
    """The same for all of `num_ranks` ranks.

    Args:
        path: of a file that does not exist before.
    """

    def __init__(self, path: str, num_ranks: int) -> None:
        self._store = FileStore(path, num_ranks)

    def place(self, name: str) -> Store:
        """Where the ranks of one group meet."""
        store: Store = PrefixStore(name, self._store)
        return store
