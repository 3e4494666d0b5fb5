"""Bars: one at a time, and anew when the same thing begins again."""

from glake_infer.cli.progress import Bars


def test_one_bar_at_a_time():
    with Bars("loading") as update:
        shown = lambda: {task.description for task in update._progress.tasks if task.visible}  # noqa: E731
        update("a", 1 << 20, 1 << 24)
        assert shown() == {"loading a"}
        update("b", 1 << 20, 1 << 24)
        assert shown() == {"loading b"}
        update("b", 1 << 24, 1 << 24)
        assert shown() == set()
        update("a", 0, 1 << 25)
        assert shown() == {"loading a"}
        (a, b) = update._progress.tasks
        assert (a.total, a.completed, a.finished) == (1 << 25, 0, False)
        assert b.finished
        update("b", 0, 1 << 24)
        assert not b.finished
