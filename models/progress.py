"""How long work says how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called as (what is going on, done, in all); bytes, or counts where nothing is read or written."""
