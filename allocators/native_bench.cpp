// _native: replaying traces and timing allocators (bench.hpp). Private: glake_infer.allocators.twins and the commands.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "bench.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using glake::CudaAsync;
using glake::Pool;
using glake::ReplayAllocator;
using glake::TraceStep;

template <class Value>
using Column = nb::ndarray<const Value, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

nb::dict run(const ReplayAllocator& allocator, const Column<std::uint8_t>& operations,
             const Column<std::uint32_t>& slots, const Column<std::uint64_t>& bytes,
             const Column<std::int32_t>& streams, const std::vector<std::uintptr_t>& handles, int repeat,
             const nb::object& between) {
  const std::size_t count = operations.size();
  if (slots.size() != count || bytes.size() != count || streams.size() != count || repeat < 1) {
    throw nb::value_error("replay() takes four columns of one length, and repeats at least once");
  }
  std::vector<TraceStep> steps(count);
  std::size_t most = 0;
  for (std::size_t i = 0; i < count; ++i) {
    steps[i] = {static_cast<char>(operations.data()[i]), slots.data()[i], bytes.data()[i], streams.data()[i]};
    most = std::max<std::size_t>(most, steps[i].slot + std::size_t{1});
    if (!handles.empty() && steps[i].stream >= static_cast<std::int32_t>(handles.size())) {
      throw nb::value_error("a step names a stream that was not given");
    }
  }
  glake::ReplayResult result;
  {
    const nb::gil_scoped_release unlocked;
    result = glake::replay(steps, most, allocator, handles, repeat, [&] {
      const nb::gil_scoped_acquire locked;
      if (!between.is_none()) between();
    });
  }
  nb::dict fields;
  fields["seconds"] = result.seconds;
  fields["all_seconds"] = result.all_seconds;
  fields["peak_sampled"] = result.peak_sampled;
  fields["failed_step"] = result.failed_step;
  fields["failure"] = result.failure;
  if (allocator.figures) {
    for (const auto& [name, value] : allocator.figures()) fields[name.c_str()] = value;
  }
  return fields;
}

ReplayAllocator on_cuda_async(CudaAsync& twin) {
  ReplayAllocator made;
  made.allocate = [](void* self, std::size_t bytes, bool, std::uintptr_t stream) {
    return static_cast<CudaAsync*>(self)->allocate(bytes, stream);
  };
  made.free = [](void* self, void* address, std::uintptr_t stream) {
    static_cast<CudaAsync*>(self)->free(address, stream);
  };
  made.self = &twin;
  made.figures = [&twin] {
    return std::vector<std::pair<std::string, std::size_t>>{{"peak_reserved", twin.peak_reserved()},
                                                            {"peak_active", twin.peak_active()}};
  };
  return made;
}

}  // namespace

void bind_bench(nb::module_& module) {
  nb::class_<ReplayAllocator>(module, "ReplayAllocator", "What replay() replays on. Keep what it was made of alive.");
  nb::class_<CudaAsync>(module, "CudaAsync", "The driver's stream-ordered allocator with a memory pool of its own.")
      .def(nb::init<int>(), "device"_a)
      .def("make_stream", &CudaAsync::make_stream)
      .def(
          "face",
          [](CudaAsync& self, std::uintptr_t stream) { return reinterpret_cast<std::uintptr_t>(self.face(stream)); },
          "stream"_a)
      .def("replay", &on_cuda_async, nb::keep_alive<0, 1>());
  module.def("replay_on_pool", [](Pool& pool) { return glake::replay_on(pool); }, "pool"_a, nb::keep_alive<0, 1>());
  module.def("replay_on_malloc", &glake::replay_on_malloc);
  module.def(
      "replay_on_ort",
      [](std::uintptr_t allocator) { return glake::replay_on(reinterpret_cast<OrtAllocator*>(allocator)); },
      "allocator"_a, "The argument is the address of an OrtAllocator.");
  module.def(
      "replay_on_driver_pool",
      [](std::uintptr_t allocator) { return glake::replay_on_driver_pool(reinterpret_cast<OrtAllocator*>(allocator)); },
      "allocator"_a, "The same for an OrtAllocator that takes its memory from a memory pool of the CUDA driver's.");
  module.def(
      "ort_register_arena",
      [](const std::string& device, int index, const nb::dict& settings) {
        std::vector<std::pair<std::string, std::size_t>> pairs;
        for (const auto [key, value] : settings) {
          pairs.emplace_back(nb::cast<std::string>(key), nb::cast<std::size_t>(value));
        }
        glake::ort_register_arena(device, index, pairs);
      },
      "device"_a, "index"_a, "settings"_a,
      nb::sig("def ort_register_arena(device: str, index: int, settings: dict[str, int]) -> None"),
      "Registers an arena with ONNX Runtime's environment, with settings by the names of CreateArenaCfgV2.");
  module.def(
      "ort_session_allocator",
      [](const nb::bytes& model, const std::string& device, int index, bool shared) {
        return reinterpret_cast<std::uintptr_t>(
            glake::ort_session_allocator({model.c_str(), model.size()}, device, index, shared));
      },
      "model"_a, "device"_a, "index"_a, "shared"_a,
      "The address of the OrtAllocator of a session that is made for it and stays.");
  module.def("replay", &run, "allocator"_a, "operations"_a, "slots"_a, "sizes"_a, "streams"_a, "handles"_a, "repeat"_a,
             "between"_a = nb::none(),
             nb::sig("def replay(allocator: ReplayAllocator, operations: object, slots: object, sizes: object, "
                     "streams: object, handles: list[int], repeat: int, between: object = None) -> "
                     "dict[str, int | float | str]"));
  module.def(
      "time_pairs",
      [](const std::vector<std::uintptr_t>& allocators, std::size_t bytes, int pairs, int rounds) {
        std::vector<OrtAllocator*> faces;
        for (const std::uintptr_t address : allocators) faces.push_back(reinterpret_cast<OrtAllocator*>(address));
        return glake::time_pairs(faces, bytes, pairs, rounds);
      },
      "allocators"_a, "size"_a, "pairs"_a, "rounds"_a, nb::call_guard<nb::gil_scoped_release>(),
      "Nanoseconds of an Alloc and a Free through each OrtAllocator, medians of alternating rounds.");
}
