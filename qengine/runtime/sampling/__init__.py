"""The parts of the sampler: what edits logits, what is asked of each row, who draws, and what is reported."""
