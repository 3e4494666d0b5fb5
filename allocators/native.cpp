// _native: the Python face of the native core. Python's own Pool (pool.py) is a handle over it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "device_pool.hpp"
#include "host_memory.hpp"
#include "ort_attach.hpp"
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

nb::object error_class(const char* name) { return nb::module_::import_("glake_infer.allocators.errors").attr(name); }

// The Python exception for a failed request.
nb::object to_python(const glake::OutOfMemory& record) {
  nb::dict holders;
  for (std::size_t tag = 0; tag < glake::tag_count; ++tag) {
    holders[glake::tag_name(static_cast<Tag>(tag))] = record.holders[tag];
  }
  return error_class("OutOfMemoryError")("requested"_a = record.requested, "active"_a = record.active,
                                         "idle"_a = record.idle, "reserved"_a = record.reserved,
                                         "limit"_a = record.limit, "needed_limit"_a = record.needed_limit,
                                         "device_free"_a = record.device_free, "holders"_a = holders);
}

void raise(const nb::object& exception) {
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(exception.ptr())), exception.ptr());
}

void translate(const std::exception_ptr& pointer, void*) {
  // What is not ours propagates, and nanobind's own translators take it.
  try {
    std::rethrow_exception(pointer);
  } catch (const glake::OutOfMemoryError& error) {
    raise(to_python(error.record));
  } catch (const glake::InvalidPointer& error) {
    raise(error_class("InvalidPointerError")(error.what()));
  } catch (const glake::LimitTooLow& error) {
    raise(error_class("PoolInUseError").attr("limit_too_low")(error.limit, error.active));
  } catch (const glake::ForkedProcess&) {
    raise(error_class("ForkedProcessError")());
  } catch (const glake::DriverError& error) {
    raise(error_class("DriverError")(error.what()));
  }
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

// The failures of ONNX Runtime's requests, as exceptions that say in `sequence` and `thread` which one.
nb::list failures(std::uint64_t since) {
  nb::list exceptions;
  for (const glake::FailedAllocation& failure : glake::host_allocator().failures(since)) {
    nb::object exception =
        failure.out_of_memory ? to_python(*failure.out_of_memory) : error_class("DriverError")(failure.message);
    exception.attr("sequence") = failure.sequence;
    exception.attr("thread") = failure.thread;
    exceptions.append(exception);
  }
  return exceptions;
}

using InitializerTuple = std::tuple<std::string, Address, std::size_t, int, std::vector<std::int64_t>>;

void begin_attach(const std::vector<InitializerTuple>& initializers) {
  std::vector<glake::Initializer> converted;
  converted.reserve(initializers.size());
  for (const auto& [name, address, bytes, element_type, shape] : initializers) {
    converted.push_back({name, address, bytes, element_type, shape});
  }
  glake::begin_attach(glake::host_allocator(), std::move(converted));
}

}  // namespace

void bind_bench(nb::module_& module);  // native_bench.cpp

NB_MODULE(_native, module) {
  module.doc() = "The native core of glake_infer.allocators. Private: use glake_infer.Pool.";
  nb::register_exception_translator(translate);

  nb::class_<Pool>(module, "Pool", "A pool of host memory of its own. The pool of a device is host_pool().")
      .def(
          "__init__",
          [](Pool* self, std::size_t limit) { new (self) Pool(std::make_unique<glake::HostMemory>(), limit); },
          "limit"_a)
      .def(
          "allocate",
          [](Pool& self, std::size_t bytes, const std::string& tag) {
            const Tag parsed = parse_tag(tag);
            const nb::gil_scoped_release unlocked;
            return self.allocate(bytes, parsed);
          },
          "size"_a, "tag"_a = "activations")
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

  nb::class_<glake::InitializerValues>(module, "InitializerValues",
                                       "ONNX Runtime's values over injected weights; released with this object.")
      .def("release", &glake::InitializerValues::release)
      .def("__len__", &glake::InitializerValues::size);

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
