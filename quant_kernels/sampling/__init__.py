"""From logits to tokens on the device: every row of a step in one launch, with its specification in `reference`.

Only the distribution is filtered and drawn from here. What edits logits before (penalties, bans) and what is reported
about them afterwards is the engine's.
"""
