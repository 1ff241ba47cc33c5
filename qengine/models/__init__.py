"""Architectures as declarations over one decoder."""
