// _native: ONNX Runtime's side, and the pools of the devices.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "device_pool.hpp"
#include "native_errors.hpp"
#include "native_parts.hpp"
#include "ort_attach.hpp"
#include "pool.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace glake::python {
namespace {

using Unlocked = nb::call_guard<nb::gil_scoped_release>;

Device device_of(const std::string& name) {
  if (const auto device = glake::parse_device(name)) return *device;
  throw nb::value_error(("unknown device '" + name + "': expected 'cpu' or 'cuda:N'").c_str());
}

OrtDeviceAllocator& allocator_of(const std::string& device) { return device_allocator(device_of(device)); }

// The failures of ONNX Runtime's requests, as exceptions that say in `sequence` and `thread` which one.
nb::list failures(std::uint64_t since, const std::string& device) {
  nb::list exceptions;
  OrtDeviceAllocator* const allocator = existing_allocator(device_of(device));
  if (allocator == nullptr) return exceptions;
  for (const FailedAllocation& failure : allocator->failures(since)) {
    nb::object exception =
        failure.out_of_memory ? to_python(*failure.out_of_memory) : error_class("DriverError")(failure.message);
    exception.attr("sequence") = failure.sequence;
    exception.attr("thread") = failure.thread;
    exceptions.append(exception);
  }
  return exceptions;
}

using InitializerTuple = std::tuple<std::string, Address, std::size_t, int, std::vector<std::int64_t>>;

void begin_attach_on(const std::vector<InitializerTuple>& initializers, const std::string& device) {
  std::vector<Initializer> converted;
  converted.reserve(initializers.size());
  for (const auto& [name, address, bytes, element_type, shape] : initializers) {
    converted.push_back({name, address, bytes, element_type, shape});
  }
  begin_attach(allocator_of(device), std::move(converted));
}

// As ONNX Runtime calls it; an exception must not pass through ctypes, so that tests come here.
Address ort_allocate(std::size_t bytes, bool reserve, const std::string& device, Address stream) {
  OrtAllocator* const face = allocator_of(device).c_struct();
  const nb::gil_scoped_release unlocked;
  if (reserve) return reinterpret_cast<Address>(face->Reserve(face, bytes));
  if (stream == 0) return reinterpret_cast<Address>(face->Alloc(face, bytes));
  return reinterpret_cast<Address>(face->AllocOnStream(face, bytes, reinterpret_cast<OrtSyncStream*>(stream)));
}

}  // namespace

void bind_ort(nb::module_& module) {
  nb::class_<InitializerValues>(module, "InitializerValues",
                                "ONNX Runtime's values over injected weights; released with this object.")
      .def("release", &InitializerValues::release)
      .def("__len__", &InitializerValues::size);

  module.def(
      "device_pool",
      [](const std::string& device) -> Pool& {
        const Device parsed = device_of(device);
        const nb::gil_scoped_release unlocked;  // opening a device takes its time
        return device_allocator(parsed).pool();
      },
      "device"_a, nb::rv_policy::reference,
      "The pool of a device ('cpu', 'cuda:0'), of which a process has one. It is never destroyed.");
  module.def(
      "host_pool", []() -> Pool& { return device_allocator({}).pool(); }, nb::rv_policy::reference,
      "device_pool('cpu')");
  module.def(
      "device_memory", [](const std::string& device) { return device_memory(device_of(device)); }, "device"_a,
      "All the memory of a CUDA device, in bytes.");
  module.def(
      "ort_allocator",
      [](const std::string& device) { return reinterpret_cast<Address>(allocator_of(device).c_struct()); },
      "device"_a = "cpu", "The address of the device's OrtAllocator (a struct of C function pointers).");
  module.def(
      "ort_api", [](const std::string& device) { return reinterpret_cast<Address>(allocator_of(device).api_table()); },
      "device"_a = "cpu",
      "The address of ONNX Runtime's table of functions; 0 before the first session options were attached.");
  module.def("ort_allocate", &ort_allocate, "size"_a, "reserve"_a = false, "device"_a = "cpu", "stream"_a = 0,
             "For tests: calls the device's OrtAllocator as ONNX Runtime does; MemoryError where that sees "
             "std::bad_alloc. `stream` is the address of an OrtSyncStream.");
  module.def("failures", &failures, "since"_a = 0, "device"_a = "cpu",
             nb::sig("def failures(since: int = 0, device: str = 'cpu') -> list[OutOfMemoryError | DriverError]"),
             "The last failed requests of ONNX Runtime with a sequence number above `since`, as exceptions.");
  module.def("failure_count", &OrtDeviceAllocator::failure_count,
             "How many requests of ONNX Runtime failed in this process, on all devices.");
  module.def("begin_attach", &begin_attach_on, "initializers"_a, "device"_a = "cpu",
             "Sets this thread's request: weights as (name, address, bytes, ONNX element type, shape).");
  module.def("finish_attach", &finish_attach, nb::sig("def finish_attach() -> InitializerValues | None"),
             "Ends this thread's request; None if ONNX Runtime did not serve it.");
}

}  // namespace glake::python
