"""Measuring: a server under load (`bench serve`), and the engine alone (`bench offline`)."""
