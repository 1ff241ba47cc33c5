"""The arithmetic of `qengine bench`, its load generator, and its commands."""
