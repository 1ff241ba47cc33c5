"""HTTP: the only floor that imports a web framework."""
