"""ONNX Runtime's session, whose runs use the weights they read (glake_infer/residency.py)."""

from __future__ import annotations

import functools
from typing import Any

from glake_infer.allocators.attach import import_onnxruntime
from glake_infer.allocators.errors import GlakeError
from glake_infer.residency import Holding


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
