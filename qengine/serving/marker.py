"""Finding a marker in text that comes character by character."""

from __future__ import annotations


class Marker:
    """Watches for `text` in a stream and keeps what may be its beginning."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.held = ""

    def feed(self, char: str) -> tuple[str, bool]:
        """Take one character.

        Returns:
            Text that is certainly not part of the marker, and whether the marker is complete (it is in neither).
        """
        self.held += char
        if self.held == self.text:
            self.held = ""
            return "", True
        passed = ""
        while not self.text.startswith(self.held):
            passed, self.held = passed + self.held[0], self.held[1:]
        return passed, False

    def flush(self) -> str:
        """What was kept, at the end of the stream."""
        held, self.held = self.held, ""
        return held
