"""Text <-> token ids, chat templates, and text made token by token.

`load_tokenizer` and `tokenizer_from_gguf` make a `Tokenizer`; an `IdsOnlyTokenizer` stands in where there is none. An
`IncrementalDetokenizer` follows one output.
"""

from qengine.tokenizer.detokenizer import IncrementalDetokenizer
from qengine.tokenizer.gguf import tokenizer_from_gguf
from qengine.tokenizer.ids_only import IdsOnlyTokenizer
from qengine.tokenizer.loading import has_tokenizer, load_tokenizer
from qengine.tokenizer.tokenizer import Tokenizer

__all__ = [
    "IdsOnlyTokenizer",
    "IncrementalDetokenizer",
    "Tokenizer",
    "has_tokenizer",
    "load_tokenizer",
    "tokenizer_from_gguf",
]
