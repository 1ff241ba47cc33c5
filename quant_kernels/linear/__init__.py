"""Prepared linears: a PackedWeight laid out for one device, ready to run. `dispatch` is the only way in."""
