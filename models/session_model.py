"""A package that an ONNX Runtime session runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from glake_infer import cuda
from glake_infer.allocators.errors import InputError, OutOfMemoryError
from glake_infer.allocators.pool import Pool
from glake_infer.holding import HostCopy
from glake_infer.mapped_files import Span, drop_pages
from glake_infer.models.device_array import DeviceArray, OrtMemory
from glake_infer.models.interchange import Borrowed
from glake_infer.models.model import Model, Place, Sharing, gpu_index
from glake_infer.models.package import Package
from glake_infer.models.session import session_errors
from glake_infer.models.values import DTYPES, element_number, from_ort_value, to_ort_value

if TYPE_CHECKING:
    import onnxruntime as ort


class SessionModel(Model):
    """A loaded package that runs in an ONNX Runtime session."""

    session: ort.InferenceSession
    """The session. Whoever keeps a reference beyond `close()` keeps the weights. Its `run` methods wake a model that
    sleeps, as ours do; code that goes around them (`session._sess`, a C++ library) must not run while it does."""

    def __init__(
        self, package: Package, pool: Pool, sharing: Sharing, host_copy: HostCopy, *, maps: bool
    ) -> None:
        """Use `load`; this only makes the empty shell."""
        super().__init__(package, pool, host_copy)
        self.sharing = sharing
        self._maps = maps  # weights are the store's files, mapped
        self._mapped_by_session: frozenset[Span] = frozenset()  # files that ONNX Runtime has mapped by itself
        self._spoiled = 0  # how many times a refused request left the session in disorder
        self._renewed = 0  # the value of _spoiled that the session was last made anew for
        self._copied: tuple[str, ...] = ()
        self._offload: Literal["none", "auto"] | int = "none"
        self._headroom = 0
        self._on_host: frozenset[str] | None = (
            None  # digests of weights that go to the host, once that is decided
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What `load` has to say: what could not be done, and what the session holds for itself."""
        return (*self._notes, *self._copied, *self._offload_notes())

    def _fallen_asleep(self) -> None:
        session = self.__dict__.get("session")  # its mappings stay while somebody has it
        if session is not None and self._mapped_by_session:
            drop_pages(self._mapped_by_session)

    def _end_session(self) -> None:
        # Its finalizer gives the weights back, once nobody else holds the session either.
        self.__dict__.pop("session", None)

    def _run(self, names: list[str], checked: Mapping[str, Any], to: Place) -> dict[str, Any]:
        while True:
            begun = self._begin()
            try:
                with self._waking(), self._open_holding():
                    try:
                        results = self._run_once(names, checked, to)
                    except OutOfMemoryError:  # in the run, not in waking
                        self._spoil()
                        raise
            finally:
                if self._captures:
                    self.pool.captures_ended()
                self._end()
            if begun == self._spoiled:
                return results
            # Another run was refused meanwhile and may have spoiled this one: once more, with a new session.

    def _run_once(self, names: list[str], checked: Mapping[str, Any], to: Place) -> dict[str, Any]:
        with self.pool.label(self._label), session_errors(self.pool, "running", self.name):
            if (
                to == "device"
                or (self._foreign and not self._maps)
                or any(isinstance(array, Borrowed) for array in checked.values())
            ):
                return self._run_bound(names, checked, to)
            if self._foreign:
                return self._run_foreign(names, checked)
            results = self.session.run(names, checked)
        # ONNX Runtime's arrays lie in the pool: they would count against its limit for as long as they live.
        return {name: _own(result) for name, result in zip(names, results, strict=True)}

    def _run_foreign(self, names: list[str], feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Run with OrtValues: ONNX Runtime's plain run knows numpy's own types alone, not bfloat16 or float8."""
        values = {name: to_ort_value(self._known[name], array) for name, array in feeds.items()}
        results = self.session.run_with_ort_values(names, values)
        return {
            name: from_ort_value(self._known[name], result)
            for name, result in zip(names, results, strict=True)
        }

    def _run_bound(self, names: list[str], feeds: Mapping[str, Any], to: Place) -> dict[str, Any]:
        """Run with addresses: inputs are read where they are, outputs of to="device" stay where they were made.

        ONNX Runtime runs on streams of its own, which wait for nobody's work, and waits for them at the end of a
        run: so the inputs are complete before it begins, and the outputs when it returns.
        """
        binding = self.session.io_binding()
        values = []  # the binding holds pointers alone
        streams = {
            (array.device, array.stream)
            for array in feeds.values()
            if isinstance(array, Borrowed) and array.stream is not None
        }
        for device, stream in streams:
            cuda.synchronize(gpu_index(device), stream)
        for name, array in feeds.items():
            if isinstance(array, Borrowed):
                number = element_number(self._known[name])
                binding.bind_input(name, "cuda", gpu_index(array.device), number, array.shape, array.address)
                continue
            value = to_ort_value(self._known[name], array)
            if not hasattr(value, "_ortvalue"):
                raise InputError(
                    f"the input {self._known[name]} is no tensor, and goes with arrays on the host alone: feed the "
                    "others from the host too, and take results with to='host'."
                )
            binding.bind_ortvalue_input(name, value)
            values.append(value)
        names = list(dict.fromkeys(names))
        for name in names:
            if to == "device" and self.pool.device != "cpu":
                binding.bind_output(name, "cuda", gpu_index(self.pool.device))
            else:
                binding.bind_output(name, "cpu")
        self.session.run_with_iobinding(binding)
        results = dict(zip(names, binding.get_outputs(), strict=True))
        if to == "device":
            return {
                name: DeviceArray(
                    OrtMemory(_alone(result)), DTYPES[self._known[name].dtype], self.pool.device
                )
                for name, result in results.items()
            }
        if all(self._known[name].dtype in DTYPES for name in names):
            return {name: from_ort_value(self._known[name], result) for name, result in results.items()}
        return {name: _own(r) for name, r in zip(names, binding.copy_outputs_to_cpu(), strict=True)}

    def _spoil(self) -> None:
        """Note that a request was refused in a run. The session is made anew before the next one, if need be.

        ONNX Runtime's convolution on CUDA (onnxruntime/core/providers/cuda/nn/conv.cc, UpdateState) notes the shape of
        its input before it allocates the output: after a refusal it takes the plan for another shape.
        """
        if not self._convolutions:
            return
        with self._condition:
            self._spoiled += 1

    def _begin(self) -> int:
        with self._condition:
            # Another thread may make the session anew while this one waits, and run again by then.
            self._condition.wait_for(
                lambda: self._spoiled == self._renewed or not self._running or self._closed
            )
            if self._spoiled != self._renewed and not self._closed:
                spoiled = self._spoiled
                self.__dict__.pop("session", None)
                self._make_session(self)
                self._renewed = spoiled
            if self._closed:
                raise self._is_closed()
            self._running += 1
            self._runs += 1
            return self._spoiled

    # Filled by load.
    _make_session: Callable[[SessionModel], None]
    _convolutions: bool = False
    _captures: bool = False  # its sessions capture CUDA graphs
    _foreign: bool


def _alone(result: ort.OrtValue) -> ort.OrtValue:
    """The same value on its own: as part of a binding's results it would keep all of them and the session."""
    from onnxruntime import OrtValue
    from onnxruntime.capi.onnxruntime_pybind11_state import OrtValueVector

    holder = OrtValueVector()
    holder.push_back(result._ortvalue)
    return OrtValue(holder[0])


def _own(result: Any) -> Any:
    """A copy outside the pool of an array, or of the arrays in a sequence or map."""
    if isinstance(result, np.ndarray):
        return result.copy()
    if isinstance(result, list):
        return [_own(part) for part in result]
    if isinstance(result, dict):
        return {key: _own(part) for key, part in result.items()}
    return result
