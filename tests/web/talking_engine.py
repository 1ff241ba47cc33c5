"""An engine without a model that says what a test tells it to, one token per step, and then ends."""

from __future__ import annotations

from typing import Any

from tests.serving.scripted_engine import ScriptedEngine


class TalkingEngine(ScriptedEngine):
    """Answers every request with the words of the last `say`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"max_model_len": 65_536, **options})

    def say(self, text: str) -> None:
        """Answer with `text` from now on."""
        self.script = self.tokenizer.encode(text, add_special_tokens=False)

    def _advance_choice(self, request: Any, choice: Any) -> None:
        super()._advance_choice(request, choice)
        if choice.finish_reason is None and len(choice.token_ids) == len(self.script):
            choice.finish_reason = "stop"
            choice.detokenizer.finish()
