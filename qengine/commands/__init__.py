"""The commands of the command line: `flags`, `parsing` and `settings` are light, the commands themselves load torch."""
