"""Imported once by the process that runs to be killed are forked from."""

import transformers.models.llama.modeling_llama

import converters.convert
import converters.quantize

__all__ = ["converters", "transformers"]
