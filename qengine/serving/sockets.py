"""The listening socket, bound before anything slow happens, so that a busy port fails at once.

Invariant: the socket that comes out is listening. A unix socket can be used by its owner only, and its path is freed
again. Who may speak through it is decided elsewhere.
"""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress

from qengine.errors import ConfigError
from qengine.serving.options import ServerOptions

_BACKLOG = 2048
_CONNECT_SECONDS = 1.0
#: Device and number of a file, which is another's once it is gone.
_File = tuple[int, int]


def open_listener(options: ServerOptions) -> socket.socket:
    """Bind and listen.

    Raises:
        ConfigError: the address is in use, unknown or not allowed.
    """
    return _listen_unix(options.uds) if options.uds is not None else _listen_tcp(options.host, options.port)


def _listen_tcp(host: str, port: int) -> socket.socket:
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"--host {host} is no address of this machine: {error.strerror}") from error
    family, _, _, _, address = infos[0]
    try:
        return socket.create_server(address[:2], family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {_reason(error)}; "
            "stop what uses it or choose another --port (0 picks one)"
        ) from error


class _UnixListener(socket.socket):
    """A listening unix socket that knows its own file."""

    def __init__(self, path: str) -> None:
        super().__init__(socket.AF_UNIX, socket.SOCK_STREAM)
        self._path = path
        self._file: _File | None = None

    def listen_there(self) -> None:
        self.bind(self._path)
        os.chmod(self._path, stat.S_IRUSR | stat.S_IWUSR)  # Before listen: nobody can have connected yet.
        self._file = _file_at(self._path)
        self.listen(_BACKLOG)

    def free_path(self) -> None:
        """Remove the file, unless another server has put its own there since. For a socket that is closed."""
        if self._file is not None and _file_at(self._path) == self._file:
            with suppress(OSError):
                if _is_refused(self._path):
                    os.unlink(self._path)


def _file_at(path: str) -> _File | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _is_refused(path: str) -> bool:
    """Whether nobody listens any more at a socket. Raises OSError if that cannot be told."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_CONNECT_SECONDS)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        return False


def _listen_unix(path: str) -> socket.socket:
    _remove_stale(path)
    listener = _UnixListener(path)
    try:
        listener.listen_there()
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on --uds {path}: {_reason(error)}") from error
    return listener


def _remove_stale(path: str) -> None:
    """Remove a socket that a dead server left; refuse one that is alive, and any other file."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # Nothing there; if it is something worse, bind says so.
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"--uds {path} exists and is no socket; choose another path")
    try:
        if not _is_refused(path):
            raise ConfigError(f"--uds {path} is in use by another server; stop it or choose another path")
        os.unlink(path)
    except OSError as error:
        raise ConfigError(f"--uds {path} is a socket that cannot be used: {_reason(error)}") from error


def _reason(error: OSError) -> str:
    """The system's words alone: socket.create_server adds the address to them."""
    return os.strerror(error.errno) if error.errno is not None else str(error)


def close_listener(listener: socket.socket) -> None:
    """Close, and free a unix socket's path."""
    listener.close()
    if isinstance(listener, _UnixListener):
        listener.free_path()


def base_url(listener: socket.socket, options: ServerOptions) -> str:
    """How programs on this machine reach the server, such as "http://127.0.0.1:8000"."""
    scheme = "http" if options.ssl_certfile is None else "https"
    if options.uds is not None:
        return f"{scheme}://localhost"
    host, port = listener.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
