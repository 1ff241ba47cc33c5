"""Text <-> token ids, chat templates, and text made token by token.

`load_tokenizer` and `tokenizer_from_gguf` make a `Tokenizer`; an `IncrementalDetokenizer` follows one output.
"""

from qengine.tokenizer.detokenizer import IncrementalDetokenizer
from qengine.tokenizer.gguf import tokenizer_from_gguf
from qengine.tokenizer.tokenizer import Tokenizer, load_tokenizer

__all__ = ["IncrementalDetokenizer", "Tokenizer", "load_tokenizer", "tokenizer_from_gguf"]
