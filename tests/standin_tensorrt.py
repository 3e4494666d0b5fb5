"""A library that behaves like TensorRT's Python API, where TensorRT cannot run: its kernels are numpy's, on a pool on "cpu".

`make(kind)` returns a module to put into `sys.modules`. Names, signatures and what calls return are TensorRT's
(tests/models/tensorrt/test_api.py compares them with the real library). A plan of `plan(...)` holds weights as real ones do:
raw, at the end, the last of them first, in one block that is asked for at deserialization.

What TensorRT leaves undefined fails here: an address that is not aligned, scratch memory that is too small, or that another
run writes to, a change of the streaming budget while there are contexts.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import json
import threading
import time
import types
import weakref

import numpy as np

VERSION = "1.7.1.116"
MAGIC = b"STANDIN\0"
TRAILER = 4
MiB = 1 << 20


class _Log:
    class Severity(enum.Enum):
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    def __init__(self):
        pass


TensorIOMode = enum.Enum("TensorIOMode", "NONE INPUT OUTPUT", start=0)
TensorLocation = enum.Enum("TensorLocation", "DEVICE HOST", start=0)
DataType = enum.Enum("DataType", "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4 FP4", start=0)
SeekPosition = enum.Enum("SeekPosition", "SET CUR END", start=0)
ExecutionContextAllocationStrategy = enum.Enum(
    "ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED", start=0
)
CudaGraphStrategy = enum.Enum("CudaGraphStrategy", "DISABLED WHOLE_GRAPH_CAPTURE", start=0)
EngineValidity = enum.Enum("EngineValidity", "VALID SUBOPTIMAL INVALID", start=0)


class EngineInvalidityDiagnostics(enum.IntEnum):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    MALFORMED_ENGINE = 32


NUMPY = {
    "FLOAT": np.float32, "HALF": np.float16, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_, "UINT8": np.uint8,
}  # fmt: skip

# What a plan computes: {name: (outputs' shapes from shapes and values of shape tensors, outputs from arrays)}.


def _linear(arrays, weights):
    hidden = np.maximum(arrays["x"] @ weights["w1"], 0)
    return {"y": hidden @ weights["w2"], "hidden": hidden}


def _nonzero(arrays, weights):
    return {"indices": np.argwhere(arrays["x"] > weights["level"][0]).astype(np.int64)}


def _resize(arrays, weights):
    del weights
    return {
        "y": np.resize(arrays["x"], tuple(arrays["sizes"])),
        "rank": np.array([len(arrays["sizes"])], np.int64),
    }


def _update(arrays, weights):
    del weights
    arrays["cache"][...] += arrays["x"]
    return {"updated": arrays["cache"]}


PROGRAMS = {
    "linear": (
        lambda s, v, w: {"y": (s["x"][0], w["w2"][1]), "hidden": (s["x"][0], w["w1"][1])},
        _linear,
    ),
    "nonzero": (lambda s, v, w: {"indices": (-1, len(s["x"]))}, _nonzero),
    "resize": (lambda s, v, w: {"y": tuple(v["sizes"]) if "sizes" in v else (-1, -1), "rank": (1,)}, _resize),
    "update": (lambda s, v, w: {"updated": s["cache"]}, _update),
}


def tensor(name, kind, shape, *, mode="INPUT", host=False, alias=None):
    return {"name": name, "dtype": kind, "shape": list(shape), "mode": mode, "host": host, "alias": alias}


def plan(
    program,
    tensors,
    weights,
    *,
    profiles=({},),
    scratch=(1 << 20, 0),
    context=0,
    late=0,
    streaming=False,
    refuse="",
):
    """Bytes of a plan. `profiles`: input -> (min, opt, max). `scratch`: bytes, and bytes per row of the first input."""
    block, places = bytearray(), {}
    for name, array in reversed(weights.items()):
        places[name] = (len(block), list(array.shape), array.dtype.str)
        block += array.tobytes()
        block += bytes(-len(block) % 128)
    header = json.dumps(
        {
            "program": program, "tensors": tensors, "profiles": profiles, "scratch": scratch, "context": context,
            "late": late,
            "streaming": streaming, "weights": places, "bytes": len(block), "refuse": refuse,
        }
    ).encode()  # fmt: skip
    table = b"THGW\0\0\0\0"  # the section of weights, as in real plans
    offset = len(MAGIC) + len(table) + 20 + len(header)
    offset += -offset % 128
    lead = MAGIC + table + offset.to_bytes(8, "little") + len(block).to_bytes(8, "little")
    lead += len(header).to_bytes(4, "little") + header
    return lead.ljust(offset, b"\0") + bytes(block) + bytes(TRAILER)


def make(kind="tensorrt-rtx"):
    """The stand-in for a kind, as a fresh module. `module.events` lists what was called, in order."""
    module = types.ModuleType(kind.replace("-", "_"))
    module.__version__ = VERSION
    module.events = []
    module.capture = None  # a list that queued runs go to instead of being run
    module.engines = weakref.WeakSet()
    module.contexts = weakref.WeakSet()
    module.ILogger = _Log
    for found in (
        TensorIOMode, TensorLocation, DataType, SeekPosition, ExecutionContextAllocationStrategy, CudaGraphStrategy,
        EngineValidity, EngineInvalidityDiagnostics,
    ):  # fmt: skip
        setattr(module, found.__name__, found)

    class IGpuAsyncAllocator:
        def __init__(self):
            pass

    class IStreamReaderV2:
        def __init__(self):
            pass

    class IOutputAllocator:
        def __init__(self):
            pass

    class Runtime:
        def __init__(self, logger):
            self.logger = logger
            self.gpu_allocator = None
            self.engine_header_size = 64
            self.defer_weights_loading = False

        def get_engine_validity(self, buffer):
            assert len(buffer) == self.engine_header_size
            return (EngineValidity.VALID, 0) if buffer[:8] == MAGIC else (EngineValidity.INVALID, 32)

        def deserialize_cuda_engine(self, source):
            try:
                return ICudaEngine(self, source, deferred=self.defer_weights_loading)
            except _FailedError as error:
                self.logger.log(self.logger.Severity.ERROR, str(error))
                return None

    class ICudaEngine:
        def __init__(self, runtime, source, *, deferred):
            self._runtime = runtime
            self._allocator = runtime.gpu_allocator
            read = _reading(source)
            lead = read(0, len(MAGIC) + 28)
            if not lead.startswith(MAGIC):
                raise _FailedError("this is no plan")
            self._offset = int.from_bytes(lead[16:24], "little")
            self._about = json.loads(read(len(MAGIC) + 28, int.from_bytes(lead[32:36], "little")))
            if self._about["refuse"]:
                raise _FailedError(self._about["refuse"])
            self.num_optimization_profiles = len(self._about["profiles"])
            self.num_io_tensors = len(self._about["tensors"])
            self.num_aux_streams = 0
            self._tensors = {each["name"]: each for each in self._about["tensors"]}
            self._block = 0
            self._deferred = deferred
            self._budget = self.streamable_weights_size
            self._host = read(self._offset, self._about["bytes"]) if self._about["streaming"] else b""
            self.live = weakref.WeakSet()
            if self._host:
                self.weight_streaming_budget_v2 = self._budget
            elif not deferred:
                self._load(read)
            module.engines.add(self)

        def _load(self, read):
            size = self._about["bytes"]
            if not size:
                return
            self._block = self._allocator.allocate_async(size, 512, 0, 0)
            if not self._block:
                raise _FailedError(f"could not allocate {size} bytes")
            data = read(self._offset, size)
            if len(data) < size:
                raise _FailedError("the plan is truncated")
            ctypes.memmove(self._block, data, size)

        def __del__(self):
            if getattr(self, "_block", 0):
                self._allocator.deallocate_async(self._block, 0)
                self._block = 0

        @property
        def streamable_weights_size(self):
            return self._about["bytes"] if self._about["streaming"] else 0

        @property
        def weight_streaming_budget_v2(self):
            return self._budget

        @weight_streaming_budget_v2.setter
        def weight_streaming_budget_v2(self, budget):
            assert not self.live, "the budget changes while there are contexts"
            if self._block:
                self._allocator.deallocate_async(self._block, 0)
                self._block = 0
            if budget and not (block := self._allocator.allocate_async(budget, 256, 0, 0)):
                self._budget = 0
                return
            self._block = block if budget else 0
            self._budget = budget

        def get_weight_streaming_automatic_budget(self):
            return self.streamable_weights_size // 2

        @property
        def weights_loaded(self):
            return bool(self._block)

        def load_weights(self, blob):
            try:
                self._load(_reading(blob))
            except _FailedError as error:
                self._runtime.logger.log(self._runtime.logger.Severity.ERROR, str(error))
                return False
            return True

        def load_weights_async(self, stream_reader, stream):
            return self.load_weights(stream_reader)

        def unload_weights(self):
            if not self._deferred or not self._block:
                return False
            self._allocator.deallocate_async(self._block, 0)
            self._block = 0
            return True

        def _weights(self):
            raw = (
                self._host or ctypes.string_at(self._block, self._about["bytes"])
                if self._about["bytes"]
                else b""
            )
            found = {}
            for name, (offset, shape, dtype) in self._about["weights"].items():
                count = int(np.prod(shape))
                found[name] = np.frombuffer(raw, dtype, count, offset).reshape(shape)
            return found

        def _scratch_for(self, rows):
            base, each = self._about["scratch"]
            return base + each * rows

        @property
        def device_memory_size_v2(self):
            return max(
                self.get_device_memory_size_for_profile_v2(p) for p in range(self.num_optimization_profiles)
            )

        def get_device_memory_size_for_profile_v2(self, profile_index):
            spans = self._about["profiles"][profile_index]
            rows = next(iter(spans.values()))[2][0] if spans else 0
            return self._scratch_for(rows) + self._streaming_scratch()

        def _streaming_scratch(self):
            return MiB if self._budget < self.streamable_weights_size else 0

        def create_runtime_config(self):
            return IRuntimeConfig()

        def create_execution_context(self, config):
            if isinstance(config, IRuntimeConfig):
                strategy, graphs = config.strategy, config.cuda_graph_strategy
            else:
                strategy, graphs = config, CudaGraphStrategy.DISABLED
            assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
            try:
                return IExecutionContext(self, graphs)
            except _FailedError as error:
                self._runtime.logger.log(self._runtime.logger.Severity.ERROR, str(error))
                return None

        def get_tensor_name(self, index):
            return self._about["tensors"][index]["name"]

        def get_tensor_mode(self, name):
            return TensorIOMode[self._tensors[name]["mode"]]

        def get_tensor_dtype(self, name):
            return DataType[self._tensors[name]["dtype"]]

        def get_tensor_shape(self, name):
            return tuple(self._tensors[name]["shape"])

        def get_tensor_location(self, name):
            return TensorLocation.HOST if self._tensors[name]["host"] else TensorLocation.DEVICE

        def get_aliased_input_tensor(self, name):
            return self._tensors[name]["alias"]

        def get_tensor_profile_shape(self, name, profile_index):
            return [tuple(each) for each in self._about["profiles"][profile_index][name]]

        def get_tensor_profile_values(self, name, profile_index):
            if not isinstance(
                name, int
            ):  # as the real bindings: the order is another than the documented one
                raise TypeError("incompatible function arguments")
            spans = self._about["profiles"][name].get(f"values of {profile_index}")
            return [list(each) for each in spans] if spans else []

    class IRuntimeConfig:
        def __init__(self):
            self.strategy = ExecutionContextAllocationStrategy.STATIC
            self.cuda_graph_strategy = CudaGraphStrategy.DISABLED
            self.cache = None

        def set_execution_context_allocation_strategy(self, strategy):
            self.strategy = strategy

        def create_runtime_cache(self):
            return IRuntimeCache()

        def set_runtime_cache(self, cache):
            self.cache = cache
            cache.users += 1
            return True

    class IRuntimeCache:
        def __init__(self):
            self.users = 0
            self.content = b""

        def deserialize(self, blob):
            if not bytes(blob).startswith(b"cache "):
                return False
            self.content = bytes(blob)
            module.events.append("cache taken")
            return True

        def serialize(self):
            return self.content or b"cache of %d contexts" % self.users

    class IExecutionContext:
        numbers = itertools.count(1)

        def __init__(self, engine, graphs):
            self.engine = engine
            self.graphs = graphs
            self.number = next(self.numbers)
            self.active_optimization_profile = 0
            self._shapes, self._addresses, self._outputs = {}, {}, {}
            self._scratch = (0, 0)
            self._held = self._late = 0
            if size := engine._about["context"]:
                self._held = engine._allocator.allocate_async(size, 256, 0, 0)
                if not self._held:
                    raise _FailedError(f"could not allocate {size} bytes for a context")
            engine.live.add(self)
            module.contexts.add(self)
            module.events.append(f"context {'with graphs' if graphs.value else 'made'}")

        def __del__(self):
            for address in (getattr(self, "_held", 0), getattr(self, "_late", 0)):
                if address:
                    self.engine._allocator.deallocate_async(address, 0)

        def _fail(self, message):
            logger = self.engine._runtime.logger
            logger.log(logger.Severity.ERROR, message)
            return False

        def set_optimization_profile_async(self, profile_index, stream_handle):
            self.active_optimization_profile = profile_index
            self._shapes.clear()
            return True

        def set_input_shape(self, name, shape):
            low, _, high = self.engine.get_tensor_profile_shape(name, self.active_optimization_profile)
            if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
                return self._fail(f"set_input_shape: {name} {shape} is outside the profile")
            self._shapes[name] = tuple(shape)
            return True

        def set_tensor_address(self, name, memory):
            if memory % 256:
                return self._fail(f"the address of {name} is not aligned")
            self._addresses[name] = memory
            return True

        def set_output_allocator(self, name, output_allocator):
            self._outputs[name] = output_allocator
            return True

        def _inputs(self):
            return [t for t in self.engine._about["tensors"] if t["mode"] == "INPUT"]

        def _all_shapes(self):
            shapes = {t["name"]: self._shapes.get(t["name"], tuple(t["shape"])) for t in self._inputs()}
            values = {
                t["name"]: self._view(t, shapes[t["name"]]).tolist()
                for t in self._inputs()
                if t["host"] and self._addresses.get(t["name"])
            }
            weights = {name: shape for name, (_, shape, _) in self.engine._about["weights"].items()}
            return shapes | PROGRAMS[self.engine._about["program"]][0](shapes, values, weights)

        def infer_shapes(self):
            shapes = self._all_shapes()
            return [t["name"] for t in self._inputs() if min(shapes[t["name"]], default=0) < 0]

        def get_tensor_shape(self, name):
            return self._all_shapes()[name]

        def get_max_output_size(self, name):
            return 4096

        def update_device_memory_size_for_shapes(self):
            return self.engine._scratch_for(self._rows())

        def _rows(self):
            return next(iter(self._shapes.values()))[0] if self._shapes else 0

        def set_device_memory(self, memory, size):
            assert memory % 256 == 0
            self._scratch = (memory, size)

        def is_stream_capturable(self, stream):
            return True

        def execute_async_v3(self, stream_handle):
            assert stream_handle
            if engine_late := self.engine._about["late"] * (not self._late):
                self._late = self.engine._allocator.allocate_async(engine_late, 256, 0, stream_handle)
            if module.capture is not None:
                frozen = (dict(self._shapes), dict(self._addresses), self._scratch)
                module.capture.append(lambda: self._execute(*frozen))
                return True
            module.events.append("run")
            return self._execute(self._shapes, self._addresses, self._scratch)

        def _view(self, tensor, shape, address=None):
            address = self._addresses[tensor["name"]] if address is None else address
            kind = np.dtype(NUMPY[tensor["dtype"]])
            size = int(np.prod(shape)) * kind.itemsize
            return np.frombuffer((ctypes.c_char * size).from_address(address), kind).reshape(shape)

        def _execute(self, given, addresses, scratch):
            engine = self.engine
            least = (
                engine._scratch_for(next(iter(given.values()))[0] if given else 0)
                + engine._streaming_scratch()
            )
            if scratch[1] < least:
                return self._fail(f"scratch memory of {scratch[1]} bytes is too small")
            if engine._about["bytes"] and not engine._block and not engine._host:
                return self._fail("the weights are not loaded")
            shapes = self._all_shapes()
            mark = (ctypes.c_char * scratch[1]).from_address(scratch[0]) if scratch[1] else None
            own = np.frombuffer(mark, np.uint8) if mark else np.empty(0, np.uint8)
            number = threading.get_ident() % 251
            own[...] = number
            arrays = {}
            for each in engine._about["tensors"]:
                if each["mode"] == "INPUT":
                    if not addresses.get(each["name"]):
                        return self._fail(f"{each['name']} has no address")
                    arrays[each["name"]] = self._view(each, shapes[each["name"]], addresses[each["name"]])
            results = PROGRAMS[engine._about["program"]][1](arrays, engine._weights())
            time.sleep(module.delay)
            if not (own == number).all():
                return self._fail("somebody else has written to the scratch memory")
            for each in engine._about["tensors"]:
                name = each["name"]
                if each["mode"] == "INPUT":
                    continue
                address, result = addresses.get(name), np.ascontiguousarray(results[name])
                if name in self._outputs:
                    asked = max(result.nbytes, 1)
                    address = self._outputs[name].reallocate_output_async(
                        name, address or 0, -(-asked // 2), 256, 1
                    )
                    address = self._outputs[name].reallocate_output_async(name, address or 0, asked, 256, 1)
                    self._outputs[name].notify_shape(name, result.shape)
                if not address:
                    return self._fail(f"the output {name} has no memory")
                ctypes.memmove(address, result.ctypes.data, result.nbytes)
            return True

    module.delay = 0.0
    for found in (
        IGpuAsyncAllocator,
        IStreamReaderV2,
        IOutputAllocator,
        Runtime,
        ICudaEngine,
        IExecutionContext,
    ):
        setattr(module, found.__name__, found)
    if kind == "tensorrt-rtx":
        module.IRuntimeConfig, module.IRuntimeCache = IRuntimeConfig, IRuntimeCache
    return module


class _FailedError(Exception):
    pass


def _reading(source):
    """read(offset, size) of a reader as the real bindings use one, or of bytes."""
    if not hasattr(source, "seek"):
        data = bytes(source)
        return lambda offset, size: data[offset : offset + size]

    def read(offset, size):
        if not source.seek(offset, SeekPosition.SET):
            return b""
        pieces = []
        while size:
            piece = source.read(size, 0)
            if not piece:
                break
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    return read
