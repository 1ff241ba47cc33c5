"""Who computes which tokens in the next step: block pool, batch and scheduler. Pure Python, no torch."""
