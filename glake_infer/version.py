"""The version, in one place for Python (pyproject.toml holds the same; a test compares them)."""

__version__ = "0.1.0"
