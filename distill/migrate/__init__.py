"""Configurations of prime-rl, rnow and verl read as ours: `python -m distill.import_config`."""
