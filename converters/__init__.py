"""Checkpoint files to PackedWeight and back. Never imports qengine and never executes anything from a file."""
