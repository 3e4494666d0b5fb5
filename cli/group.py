"""The class of our groups of commands."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup


class Group(TyperGroup):
    """A group whose `--help` is False rather than None where it is not given.

    typer passes None to pydantic to be made a bool, and importing that would cost every help 0.15 s.
    """

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option, its default made False."""
        option = super().get_help_option(ctx)
        if option is not None and option.default is None:
            option.default = False
        return option
