"""The errors of this package. It does not log and it does not exit: callers decide.

Invariant: a `CheckpointError` names the file or tensor, what was found, what was expected, and what to do; a
`WriteError` names the file that could not be written, why, and what is left of the work.
"""


class CheckpointError(ValueError):
    """A model or calibration file that cannot be loaded, or written, with the reason."""


class WriteError(RuntimeError):
    """A file that could not be written: a full disk, a folder that is read-only."""
