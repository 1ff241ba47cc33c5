"""How many connections the system lets this process hold: its limit on open files, raised where that is allowed.

Invariant: with as many connections as it says there is room for files of other kinds, so that accepting never fails for
want of one. It opens nothing itself.
"""

from __future__ import annotations

import logging
import resource

logger = logging.getLogger(__name__)

#: For everything but connections: logs, pipes to ranks, shared memory, sockets that are being closed.
NUM_OTHER_FILES = 512
_FEWEST_CONNECTIONS = 16


def make_room(num_connections: int) -> int:
    """Raise the soft limit as far as `num_connections` need it and the hard one allows; returns how many fit.

    It is not raised further: programs that are started inherit it, and some look at every number below it.
    """
    wanted = num_connections + NUM_OTHER_FILES
    soft, hard = (_finite(limit) for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    if soft < wanted:
        raised = min(wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard if hard < _NO_LIMIT else resource.RLIM_INFINITY))
            soft = raised
        except (OSError, ValueError) as error:
            logger.warning("the limit on open files stays at %d: %s", soft, error)
    if soft >= wanted:
        return num_connections
    fitting = max(_FEWEST_CONNECTIONS, soft - NUM_OTHER_FILES, soft // 2)
    logger.warning(
        "the limit of %d open files has room for %d connections and not for %d; raise it, such as with 'ulimit -n %d' "
        "or LimitNOFILE= of systemd",
        soft,
        fitting,
        num_connections,
        wanted,
    )
    return fitting


_NO_LIMIT = 2**62


def _finite(limit: int) -> int:
    return _NO_LIMIT if limit == resource.RLIM_INFINITY else limit
