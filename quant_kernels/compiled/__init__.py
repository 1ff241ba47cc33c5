"""Kernels compiled for cards that are not there: what can be selected, what each costs, and what it may cost."""
