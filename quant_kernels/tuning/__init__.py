"""Which configuration of a kernel runs a problem: reviewed tables per GPU, and a rule where there is none."""
