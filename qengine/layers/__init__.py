"""The building blocks of a decoder: linear, attention, norm, rope, embedding. No format and no model names here."""
