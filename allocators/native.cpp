// _native: the Python face of the native core. Python's own Pool (pool.py) is a handle over it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <string>
#include <utility>

#include "host_memory.hpp"
#include "native_debug.hpp"
#include "native_devices.hpp"
#include "ort_attach.hpp"
#include "native_errors.hpp"
#include "native_parts.hpp"
#include "pool.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using glake::Address;
using glake::Pool;
using glake::Tag;
using Unlocked = nb::call_guard<nb::gil_scoped_release>;

Tag parse_tag(const std::string& name) {
  for (std::size_t tag = 0; tag < glake::tag_count; ++tag) {
    if (name == glake::tag_name(static_cast<Tag>(tag))) return static_cast<Tag>(tag);
  }
  throw nb::value_error(("unknown tag '" + name + "': expected 'activations' or 'weights'").c_str());
}

nb::dict stats(const Pool& pool) {
  glake::PoolStats stats;
  {
    const nb::gil_scoped_release unlocked;
    stats = pool.stats();
  }
  nb::dict fields;
  fields["active"] = stats.active;
  fields["idle"] = stats.idle;
  fields["reserved"] = stats.reserved;
  fields["peak_active"] = stats.peak_active;
  fields["peak_reserved"] = stats.peak_reserved;
  fields["requested"] = stats.requested;
  fields["limit"] = stats.limit;
  fields["weights"] = stats.weights;
  fields["mapped_files"] = stats.mapped_files;
  fields["allocations"] = stats.allocations;
  fields["deallocations"] = stats.deallocations;
  fields["chunks"] = stats.chunks;
  fields["blocks"] = stats.blocks;
  fields["stitched_blocks"] = stats.stitched_blocks;
  fields["slabs"] = stats.slabs;
  fields["driver_calls"] = stats.driver_calls;
  return fields;
}

thread_local std::string thread_label;

}  // namespace

void bind_bench(nb::module_& module);  // native_bench.cpp

NB_MODULE(_native, module) {
  module.doc() = "The native core of glake_infer.allocators. Private: use glake_infer.Pool.";
  nb::register_exception_translator(translate);
  bind_devices(module);
  nb::register_exception_translator(glake::python::translate);
  bind_debug(module);

  nb::class_<Pool>(module, "Pool", "A pool of host memory of its own. The pool of a device is device_pool().")
      .def(
          "__init__",
          [](Pool* self, std::size_t limit) { new (self) Pool(std::make_unique<glake::HostMemory>(), limit); },
          "limit"_a)
      .def(
          "allocate",
          [](Pool& self, std::size_t bytes, const std::string& tag, std::int64_t stream) {
            const Tag parsed = parse_tag(tag);
            const nb::gil_scoped_release unlocked;
            return self.allocate(bytes, parsed, static_cast<glake::StreamHandle>(stream));
          },
          "size"_a, "tag"_a = "activations", "stream"_a = -1)
      .def("deallocate", &Pool::deallocate, "address"_a, Unlocked())
      .def("map_file", &Pool::map_file, "descriptor"_a, "size"_a, Unlocked())
      .def("unmap_file", &Pool::unmap_file, "address"_a, Unlocked())
      .def("trim", &Pool::trim, "target"_a = 0, Unlocked())
      .def("set_limit", &Pool::set_limit, "limit"_a, Unlocked())
      .def("stats", &stats, nb::sig("def stats(self) -> dict[str, int]"))
      .def("reset_peaks", &Pool::reset_peaks, Unlocked())
      .def("check_invariants", &Pool::check_invariants, Unlocked())
      .def("inject_failure", &Pool::inject_failure, "n"_a, "times"_a = 1,
           "For tests: n coming driver calls pass, and the `times` after them fail; a negative n disarms.", Unlocked());

  module.def(
      "set_label", [](std::string name) { thread_label = std::move(name); }, "name"_a,
      "Names the holder of what this thread allocates from now on; empty for none.");

  glake::python::bind_ort(module);
  module.def(
      "host_pool", []() -> Pool& { return glake::host_allocator().pool(); }, nb::rv_policy::reference,
      "The pool of the device 'cpu', of which a process has one. It is never destroyed.");
  module.def(
      "ort_allocator", [] { return reinterpret_cast<Address>(glake::host_allocator().c_struct()); },
      "The address of the host pool's OrtAllocator (a struct of C function pointers).");
  module.def(
      "ort_allocate",
      [](std::size_t bytes, bool reserve) {
        OrtAllocator* const face = glake::host_allocator().c_struct();
        return reinterpret_cast<Address>((reserve ? face->Reserve : face->Alloc)(face, bytes));
      },
      "size"_a, "reserve"_a = false, Unlocked(),
      "For tests: calls the host pool's OrtAllocator as ONNX Runtime does; MemoryError where that sees "
      "std::bad_alloc.");
  module.def("failures", &failures, "since"_a = 0,
             nb::sig("def failures(since: int = 0) -> list[OutOfMemoryError | DriverError]"),
             "The last failed requests of ONNX Runtime with a sequence number above `since`, as exceptions.");
  module.def(
      "failure_count", [] { return glake::host_allocator().failure_count(); },
      "How many requests of ONNX Runtime failed in this process.");
  module.def("begin_attach", &begin_attach, "initializers"_a,
             "Sets this thread's request: weights as (name, address, bytes, ONNX element type, shape).");
  module.def("finish_attach", &glake::finish_attach, nb::sig("def finish_attach() -> InitializerValues | None"),
             "Ends this thread's request; None if ONNX Runtime did not serve it.");
  bind_bench(module);
}
