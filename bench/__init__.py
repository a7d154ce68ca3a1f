"""Measured figures; each module prints a table and one JSON line last. See bench/README.md."""
