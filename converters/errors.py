"""The one error of this package. It does not log and it does not exit: callers decide.

Invariant: a `CheckpointError` names the file or tensor, what was found, what was expected, and what to do.
"""


class CheckpointError(ValueError):
    """A model or calibration file that cannot be loaded, or written, with the reason."""
