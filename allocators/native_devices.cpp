// The part of _native about devices: which there are, and their memory and streams one by one, for tests.
#include "native_devices.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <tuple>

#include "cuda_driver.hpp"
#include "cuda_memory.hpp"
#include "host_memory.hpp"
#include "simulated_streams.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using glake::Address;
using glake::ChunkHandle;
using glake::EventHandle;
using glake::SimulatedStreams;
using glake::StreamHandle;
using glake::StreamOrder;
using glake::VirtualMemory;
using Unlocked = nb::call_guard<nb::gil_scoped_release>;

// -1 stands for "no stream" in Python.
StreamHandle to_handle(std::int64_t stream) { return static_cast<StreamHandle>(stream); }

glake::Access parse_access(const std::string& name) {
  if (name == "none") return glake::Access::none;
  if (name == "read_only") return glake::Access::read_only;
  if (name == "read_write") return glake::Access::read_write;
  throw nb::value_error(("unknown access '" + name + "': expected none, read_only or read_write").c_str());
}

// Whether a graph is gone; see StreamOrder::watch_graph().
struct GraphFlag {
  std::shared_ptr<std::atomic<bool>> dead = std::make_shared<std::atomic<bool>>(false);
};

}  // namespace

void bind_devices(nb::module_& module) {
  module.def("cuda_driver_version", &glake::cuda_driver_version,
             "The version of the CUDA driver's API, as 1000 * major + 10 * minor; DriverError says why there is none.");
  module.def("cuda_device_count", &glake::cuda_device_count,
             "How many CUDA devices this process sees; 0 where the driver is there and shows none.");
  module.def("cuda_device_name", &glake::cuda_device_name, "index"_a);
  module.def("cuda_device_memory", &glake::cuda_device_memory, "index"_a, "All of a CUDA device's memory, in bytes.");

  nb::class_<GraphFlag>(module, "GraphFlag", "For tests: whether a captured graph is gone.")
      .def_prop_ro("dead", [](const GraphFlag& self) { return self.dead->load(std::memory_order_acquire); });

  nb::class_<StreamOrder>(module, "StreamOrder", "For tests: the streams and events of a device.")
      .def(
          "state",
          [](StreamOrder& self, std::int64_t stream) -> nb::object {
            std::optional<glake::StreamState> state;
            {
              const nb::gil_scoped_release unlocked;
              state = self.state(to_handle(stream));
            }
            if (!state) return nb::none();
            return nb::make_tuple(state->id, state->capture);
          },
          "stream"_a, nb::sig("def state(self, stream: int) -> tuple[int, int] | None"))
      .def(
          "create_event", [](StreamOrder& self) { return self.create_event().value; }, Unlocked())
      .def(
          "destroy_event", [](StreamOrder& self, std::uintptr_t event) { self.destroy_event({event}); }, "event"_a,
          Unlocked())
      .def(
          "record",
          [](StreamOrder& self, std::uintptr_t event, std::int64_t stream) { self.record({event}, to_handle(stream)); },
          "event"_a, "stream"_a, Unlocked())
      .def(
          "record_all", [](StreamOrder& self, std::uintptr_t event) { self.record_all({event}); }, "event"_a,
          Unlocked())
      .def(
          "wait",
          [](StreamOrder& self, std::int64_t stream, std::uintptr_t event) { self.wait(to_handle(stream), {event}); },
          "stream"_a, "event"_a, Unlocked())
      .def(
          "finished", [](StreamOrder& self, std::uintptr_t event) { return self.finished({event}); }, "event"_a,
          Unlocked())
      .def(
          "synchronize", [](StreamOrder& self, std::uintptr_t event) { self.synchronize({event}); }, "event"_a,
          Unlocked())
      .def("synchronize_all", &StreamOrder::synchronize_all, Unlocked())
      .def(
          "watch_graph",
          [](StreamOrder& self, std::int64_t stream) {
            GraphFlag flag;
            self.watch_graph(to_handle(stream), flag.dead);
            return flag;
          },
          "stream"_a, Unlocked());

  nb::class_<VirtualMemory>(module, "VirtualMemory", "For tests: a device's memory, call by call.")
      .def_prop_ro("granularity", &VirtualMemory::granularity)
      .def_prop_ro("granularity_on_host", &VirtualMemory::granularity_on_host)
      .def_prop_ro("free_bytes", &VirtualMemory::free_bytes)
      .def_prop_ro("calls", &VirtualMemory::calls)
      .def("reserve", &VirtualMemory::reserve, "size"_a, Unlocked())
      .def("release", &VirtualMemory::release, "address"_a, "size"_a, Unlocked())
      .def(
          "create", [](VirtualMemory& self, std::size_t bytes) { return self.create(bytes).value; }, "size"_a,
          Unlocked())
      .def(
          "create_on_host", [](VirtualMemory& self, std::size_t bytes) { return self.create_on_host(bytes).value; },
          "size"_a, Unlocked())
      .def(
          "create_shared",
          [](VirtualMemory& self, std::size_t bytes) {
            const glake::ChunkHandle made = self.create_shared(bytes);
            return std::make_tuple(made.value, made.descriptor);
          },
          "size"_a, "Returns the handle and its descriptor.", Unlocked())
      .def(
          "adopt",
          [](VirtualMemory& self, int descriptor, std::size_t bytes) { return self.adopt(descriptor, bytes).value; },
          "descriptor"_a, "size"_a, Unlocked())
      .def(
          "destroy",
          [](VirtualMemory& self, std::uint64_t handle, std::size_t bytes, int descriptor) {
            self.destroy({handle, bytes, descriptor});
          },
          "handle"_a, "size"_a, "descriptor"_a = -1, Unlocked())
      .def(
          "map",
          [](VirtualMemory& self, Address address, std::uint64_t handle, std::size_t bytes, int descriptor,
             const std::string& access) { self.map(address, {handle, bytes, descriptor}, parse_access(access)); },
          "address"_a, "handle"_a, "size"_a, "descriptor"_a = -1, "access"_a = "read_write", Unlocked())
      .def(
          "freeze",
          [](VirtualMemory& self, std::uint64_t handle, std::size_t bytes, int descriptor,
             const std::vector<Address>& addresses) { self.freeze({handle, bytes, descriptor}, addresses); },
          "handle"_a, "size"_a, "descriptor"_a, "addresses"_a, Unlocked())
      .def("unmap", &VirtualMemory::unmap, "address"_a, "size"_a, Unlocked())
      .def(
          "protect",
          [](VirtualMemory& self, Address address, std::size_t bytes, const std::string& access) {
            self.protect(address, bytes, parse_access(access));
          },
          "address"_a, "size"_a, "access"_a, Unlocked())
      .def("map_file", &VirtualMemory::map_file, "descriptor"_a, "size"_a, "address"_a = 0, Unlocked())
      .def(
          "fill",
          [](VirtualMemory& self, Address address, std::size_t bytes, unsigned char value, std::int64_t stream) {
            self.fill(address, bytes, value, to_handle(stream));
          },
          "address"_a, "size"_a, "value"_a, "stream"_a = -1, Unlocked())
      .def(
          "read",
          [](VirtualMemory& self, Address address, std::size_t bytes) {
            std::string data(bytes, '\0');
            {
              const nb::gil_scoped_release unlocked;
              self.read(data.data(), address, bytes);
            }
            return nb::bytes(data.data(), data.size());
          },
          "address"_a, "size"_a)
      .def("streams", &VirtualMemory::streams, nb::rv_policy::reference_internal,
           nb::sig("def streams(self) -> StreamOrder | None"))
      .def("inject_failure", &VirtualMemory::inject_failure, "n"_a, "times"_a = 1);

  module.def(
      "cuda_memory",
      [](int device) -> std::unique_ptr<VirtualMemory> { return std::make_unique<glake::CudaMemory>(device); },
      "device"_a, Unlocked(), "For tests: the memory of a CUDA device, without a pool.");
  module.def(
      "host_memory", []() -> std::unique_ptr<VirtualMemory> { return std::make_unique<glake::HostMemory>(); },
      "For tests: host memory, without a pool.");

  nb::class_<SimulatedStreams, StreamOrder>(module, "SimulatedDevice",
                                            "For tests: a device with streams, made of threads and host memory.")
      .def(nb::new_([] { return std::make_shared<SimulatedStreams>(); }))
      .def(
          "memory",
          [](std::shared_ptr<SimulatedStreams> self) { return glake::make_simulated_device(std::move(self)); },
          "Memory on this device, without a pool.")
      .def("new_stream", &SimulatedStreams::create_stream, Unlocked())
      .def("destroy_stream", &SimulatedStreams::destroy_stream, "stream"_a, Unlocked())
      .def("enqueue_fill", &SimulatedStreams::enqueue_fill, "stream"_a, "address"_a, "size"_a, "value"_a,
           "delay_us"_a = 0, Unlocked())
      .def("enqueue_check", &SimulatedStreams::enqueue_check, "stream"_a, "address"_a, "size"_a, "value"_a, Unlocked())
      .def("enqueue_delay", &SimulatedStreams::enqueue_delay, "stream"_a, "delay_us"_a, Unlocked())
      .def("synchronize_stream", &SimulatedStreams::synchronize_stream, "stream"_a, Unlocked())
      .def("begin_capture", &SimulatedStreams::begin_capture, "stream"_a, Unlocked())
      .def("end_capture", &SimulatedStreams::end_capture, "stream"_a, Unlocked())
      .def("launch_graph", &SimulatedStreams::launch_graph, "graph"_a, "stream"_a, Unlocked())
      .def("destroy_graph", &SimulatedStreams::destroy_graph, "graph"_a, Unlocked())
      .def("wait_in_captures", &SimulatedStreams::wait_in_captures, "on"_a, Unlocked())
      .def_prop_ro("mismatches", &SimulatedStreams::mismatches)
      .def_prop_ro("misuses", &SimulatedStreams::misuses);
}
