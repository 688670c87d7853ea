"""The version of Shoal; pyproject.toml repeats it, and a test compares the two."""

VERSION = "0.1.0"
