"""Attention over a paged KV cache: the specification, and what runs it on each device."""
