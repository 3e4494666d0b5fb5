"""ONNX Runtime's session: one whose runs use the weights they read, and its errors as ours."""

from __future__ import annotations

import functools
from types import TracebackType
from typing import Any

from glake_infer.allocators.attach import import_onnxruntime
from glake_infer.allocators.errors import GlakeError, InputError, ModelError
from glake_infer.allocators.pool import Pool
from glake_infer.holding import Holding


def guarded_session(holding: Holding) -> Any:
    """Return what makes an `onnxruntime.InferenceSession` whose runs bring the holding's weights back first.

    Whoever runs the session directly is safe as well: each run method waits, wakes and raises as `Model.run` does.
    """
    return functools.partial(_class(), holding)


@functools.cache
def _class() -> Any:
    runtime = import_onnxruntime()

    class GuardedSession(runtime.InferenceSession):  # type: ignore[misc, name-defined]
        """A session over weights that come and go."""

        def __init__(self, holding: Holding, *arguments: Any, **options: Any) -> None:
            self._holding = holding
            super().__init__(*arguments, **options)

        def run(self, *arguments: Any, **options: Any) -> Any:
            with self._holding:
                return super().run(*arguments, **options)

        def run_with_iobinding(self, *arguments: Any, **options: Any) -> Any:
            with self._holding:
                return super().run_with_iobinding(*arguments, **options)

        def run_with_ort_values(self, *arguments: Any, **options: Any) -> Any:
            with self._holding:
                return super().run_with_ort_values(*arguments, **options)

        def run_with_ortvaluevector(self, *arguments: Any, **options: Any) -> Any:
            with self._holding:
                return super().run_with_ortvaluevector(*arguments, **options)

        def run_async(self, *arguments: Any, **options: Any) -> Any:
            del arguments, options
            raise GlakeError(
                "run_async is not possible on a model's session: its weights could go while the run is in progress. Call "
                "run, in a thread of your own."
            )

    GuardedSession.__name__ = GuardedSession.__qualname__ = "InferenceSession"
    return GuardedSession


_WRONG_FEEDS = ("Got invalid dimensions for input", "Invalid rank for input", "Unexpected input data type")
"""What says, in the plain RuntimeError of a run with an IOBinding, that the feeds were wrong."""


class session_errors:  # noqa: N801  (reads as a verb phrase: with session_errors(pool, "running", "x"))
    """Turn ONNX Runtime's exceptions into ours; a request that our pool refused becomes the pool's own error.

    No generator: the traceback would be kept by its frames, the traceback keeps the session, and the session its
    weights, for as long as somebody keeps the error.
    """

    def __init__(self, pool: Pool, action: str, model: str) -> None:
        self._pool = pool
        self._what = (action, model)

    def __enter__(self) -> None:
        """Nothing to do."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del trace
        if kind is None or error is None:
            return
        if isinstance(error, GlakeError):  # of waking: raised where the session's frame is in the traceback
            raise error.with_traceback(None)
        # A refusal is known by its number: an IOBinding that copies an input to the device raises a MemoryError with it.
        refusal = self._pool.explain(error)
        # A run with an IOBinding raises a plain RuntimeError.
        if refusal is None and kind is not RuntimeError and not kind.__module__.startswith("onnxruntime"):
            return
        error.__traceback__ = None
        if refusal is not None:
            raise refusal from error
        text = str(error).strip()
        wrong_feeds = self._what[0] == "running" and (
            kind.__name__ == "InvalidArgument" or any(hint in text for hint in _WRONG_FEEDS)
        )
        ours = InputError if wrong_feeds else ModelError
        raise ours(f"ONNX Runtime refused while {' '.join(self._what)}: {text}") from error
