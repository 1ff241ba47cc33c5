"""Attention over a paged KV cache: how keys and values are stored, the specification, and what runs on each device."""
