// The part of _native about transfers: the engine, its paths, and host memory that devices copy from.
#include "native_transfers.hpp"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cuda_link.hpp"
#include "native_errors.hpp"
#include "transfer_engine.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using glake::Address;
using glake::Direction;
using glake::TransferEngine;
using Unlocked = nb::call_guard<nb::gil_scoped_release>;
using Rates = std::pair<double, double>;

std::shared_ptr<const glake::CudaContext> context_of(int index) {
  static auto& made = *new std::unordered_map<int, std::shared_ptr<const glake::CudaContext>>();  // for good
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  auto& found = made[index];
  if (!found) found = std::make_shared<const glake::CudaContext>(index);
  return found;
}

// The engine, and the host memory that was taken from it.
class Engine {
 public:
  Engine(std::shared_ptr<glake::HostBuffers> buffers, TransferEngine::Options options)
      : made_(std::make_unique<TransferEngine>(buffers, options)), buffers_(std::move(buffers)), engine(*made_) {}
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;
  ~Engine() {
    if (engine.is_child()) {  // the threads are the parent's, and so is the memory
      (void)made_.release();
      return;
    }
    made_.reset();  // nothing uses the memory any more
    for (const auto& [address, buffer] : taken_) buffers_->give(buffer);
  }

  std::pair<Address, bool> take(std::size_t bytes) {
    if (engine.is_child()) throw glake::ForkedProcess();
    const glake::HostBuffer made = buffers_->take(bytes);
    const std::lock_guard lock(mutex_);
    taken_.emplace(reinterpret_cast<Address>(made.data), made);
    return {reinterpret_cast<Address>(made.data), made.locked};
  }
  void give(Address address) {
    if (engine.is_child()) throw glake::ForkedProcess();
    glake::HostBuffer buffer;
    {
      const std::lock_guard lock(mutex_);
      const auto found = taken_.find(address);
      if (found == taken_.end()) throw std::invalid_argument("no host memory was taken there");
      buffer = found->second;
      taken_.erase(found);
    }
    buffers_->give(buffer);
  }

 private:
  std::unique_ptr<TransferEngine> made_;
  std::shared_ptr<glake::HostBuffers> buffers_;
  std::mutex mutex_;
  std::unordered_map<Address, glake::HostBuffer> taken_;

 public:
  TransferEngine& engine;
};

// A transfer keeps its engine.
struct Transfer {
  std::shared_ptr<Engine> engine;
  TransferEngine::Handle handle;
};

TransferEngine::Options options(unsigned readers, std::size_t slot, std::size_t in_flight, std::size_t gap) {
  if (readers == 0 || slot < glake::PieceReader::block || slot % glake::PieceReader::block != 0 || in_flight < slot) {
    throw nb::value_error(
        "expected at least one reader, slots of whole blocks of 4096 bytes, and room for one of them");
  }
  return {readers, slot, in_flight, gap};
}

std::array<double, glake::direction_count> rates(const Rates& pair) { return {pair.first, pair.second}; }

nb::dict view(const Transfer& transfer) {
  const TransferEngine::View seen = transfer.engine->engine.view(transfer.handle);
  nb::dict fields;
  fields["number"] = transfer.engine->engine.number(transfer.handle);
  fields["bytes"] = seen.bytes;
  fields["done"] = seen.done;
  fields["ended"] = seen.ended;
  fields["cancelled"] = seen.cancelled;
  nb::object read_error = nb::none();
  if (seen.read_error) read_error = nb::make_tuple(seen.read_error->code, seen.file, seen.read_error->missing);
  fields["read_error"] = read_error;
  fields["link_error"] = seen.link_error;
  fields["lost_links"] = seen.lost_links;
  return fields;
}

nb::list paths(const Engine& self, int target) {
  nb::list found;
  for (const TransferEngine::PathView& path : self.engine.paths(target)) {
    nb::dict fields;
    fields["name"] = path.name;
    fields["number"] = path.number;
    fields["rates"] = nb::make_tuple(path.rate[0], path.rate[1]);
    fields["bytes"] = nb::make_tuple(path.bytes[0], path.bytes[1]);
    fields["failed"] = path.failed;
    found.append(fields);
  }
  return found;
}

nb::dict memory(const Engine& self) {
  const TransferEngine::Memory seen = self.engine.memory();
  nb::dict fields;
  fields["allocated"] = seen.allocated;
  fields["in_use"] = seen.in_use;
  fields["peak"] = seen.peak;
  fields["locked"] = seen.locked;
  return fields;
}

Transfer load(
    const std::shared_ptr<Engine>& self, int target, std::vector<std::string> files,
    const std::vector<std::tuple<std::uint32_t, std::uint64_t, std::size_t, Address, std::size_t, std::size_t>>& parts,
    int priority, unsigned used, bool around_cache, bool in_place) {
  const nb::gil_scoped_release unlocked;
  std::vector<glake::FilePart> made;
  made.reserve(parts.size());
  for (const auto& [file, offset, bytes, address, rows, pitch] : parts) {
    for (std::size_t row = 0; row < rows; ++row) {
      made.push_back({file, offset + row * bytes, bytes, address + row * pitch});
    }
  }
  return {self,
          self->engine.load(target, std::move(files), std::move(made), {priority, used, around_cache, in_place, 0})};
}

Transfer copy(const std::shared_ptr<Engine>& self, int target, bool to_device,
              const std::vector<std::tuple<Address, Address, std::size_t>>& spans, int priority, unsigned used,
              std::size_t piece) {
  std::vector<TransferEngine::Span> made;
  made.reserve(spans.size());
  for (const auto& [host, device, bytes] : spans) made.push_back({reinterpret_cast<std::byte*>(host), device, bytes});
  const nb::gil_scoped_release unlocked;
  const Direction direction = to_device ? Direction::to_device : Direction::to_host;
  return {self, self->engine.copy(target, direction, made, {priority, used, false, false, piece})};
}

std::vector<std::tuple<bool, std::size_t, int, std::uint64_t, std::int64_t, std::int64_t, std::size_t>> take_events(
    Engine& self) {
  std::vector<std::tuple<bool, std::size_t, int, std::uint64_t, std::int64_t, std::int64_t, std::size_t>> found;
  for (const TransferEngine::Event& event : self.engine.take_events()) {
    found.emplace_back(event.read, event.who, event.target, event.transfer, event.start, event.end, event.bytes);
  }
  return found;
}

}  // namespace

void bind_transfers(nb::module_& module) {
  module.def(
      "cuda_peers",
      [](int own, int peer) {
        const auto first = context_of(own);
        const auto second = context_of(peer);
        int can = 0;
        first->check(first->driver.can_access_peer(&can, first->device(), second->device()),
                     "asking whether GPUs are peers (cuDeviceCanAccessPeer)");
        return can != 0;
      },
      "own"_a, "peer"_a, Unlocked(), "Whether the first GPU can read and write the other's memory.");

  nb::class_<Transfer>(module, "Transfer", "What one caller wants moved. Dropping it does not end it.")
      .def(
          "wait", [](const Transfer& self, double seconds) { return self.engine->engine.wait(self.handle, seconds); },
          "seconds"_a, Unlocked(), "Whether it has ended, at the latest after so many seconds.")
      .def(
          "cancel", [](const Transfer& self) { self.engine->engine.cancel(self.handle); }, Unlocked(),
          "It ends soon: wait for that.")
      .def("view", &view, nb::sig("def view(self) -> dict[str, Any]"), "How far it is, and what went wrong.");

  nb::class_<Engine>(module, "TransferEngine", "Bytes of files and host memory to devices, and back; see the header.")
      .def_static(
          "on_host",
          [](unsigned readers, std::size_t slot, std::size_t in_flight, std::size_t gap) {
            return std::make_shared<Engine>(std::make_shared<glake::HostBuffers>(),
                                            options(readers, slot, in_flight, gap));
          },
          "readers"_a, "slot"_a, "in_flight"_a, "gap"_a)
      .def_static(
          "on_cuda",
          [](int index, unsigned readers, std::size_t slot, std::size_t in_flight, std::size_t gap) {
            return std::make_shared<Engine>(std::make_shared<glake::CudaHostBuffers>(context_of(index)),
                                            options(readers, slot, in_flight, gap));
          },
          "index"_a, "readers"_a, "slot"_a, "in_flight"_a, "gap"_a, Unlocked(), "For all GPUs; opens one of them.")
      .def(
          "set_options",
          [](Engine& self, unsigned readers, std::size_t slot, std::size_t in_flight, std::size_t gap) {
            const TransferEngine::Options made = options(readers, slot, in_flight, gap);
            const nb::gil_scoped_release unlocked;
            self.engine.set_options(made);
          },
          "readers"_a, "slot"_a, "in_flight"_a, "gap"_a)
      .def(
          "add_host_path",
          [](Engine& self, int target, std::string name, double rate, double latency,
             std::optional<std::size_t> fails_after, std::size_t most, Rates known) {
            self.engine.add_path(target,
                                 std::make_unique<glake::HostLink>(
                                     std::move(name), glake::HostLink::Options{rate, latency, fails_after, most}),
                                 rates(known));
          },
          "target"_a, "name"_a, "rate"_a = 0.0, "latency"_a = 0.0, "fails_after"_a = nb::none(), "most"_a = SIZE_MAX,
          "known"_a = Rates{0, 0}, Unlocked(), "Memory of the process as a device; `rate` in bytes per second.")
      .def(
          "add_cuda_path",
          [](Engine& self, int index, Rates known) {
            self.engine.add_path(index, std::make_unique<glake::CudaLink>(context_of(index)), rates(known));
          },
          "index"_a, "known"_a = Rates{0, 0}, Unlocked(), "The GPU's own link.")
      .def(
          "add_cuda_relay",
          [](Engine& self, int index, int peer, Address staging, std::size_t bytes, Rates known) {
            self.engine.add_path(
                index, std::make_unique<glake::CudaRelay>(context_of(index), context_of(peer), staging, bytes),
                rates(known));
          },
          "index"_a, "peer"_a, "staging"_a, "size"_a, "known"_a = Rates{0, 0}, Unlocked(),
          "A peer's link, by a buffer in its memory that stays until remove_further_paths().")
      .def(
          "remove_further_paths", [](Engine& self, int target) { self.engine.remove_further_paths(target); },
          "target"_a, Unlocked())
      .def("paths", &paths, "target"_a, nb::sig("def paths(self, target: int) -> list[dict[str, Any]]"))
      .def("load", &load, "target"_a, "files"_a, "parts"_a, "priority"_a = 0, "paths"_a = 1, "around_cache"_a = false,
           "in_place"_a = false,
           "Parts: (number of the file, offset, bytes of a row, address, rows, bytes from one row's address to the "
           "next's) "
           "each.")
      .def("copy", &copy, "target"_a, "to_device"_a, "spans"_a, "priority"_a = 0, "paths"_a = 1, "piece"_a = 0,
           "Spans: (address of host memory, address of the device's, bytes) each.")
      .def("take_buffer", &Engine::take, "size"_a, Unlocked(),
           "Host memory for copies: its address, and whether it is page-locked.")
      .def("give_buffer", &Engine::give, "address"_a, Unlocked())
      .def("memory", &memory, nb::sig("def memory(self) -> dict[str, int]"))
      .def(
          "prepare", [](Engine& self) { self.engine.prepare(); }, Unlocked())
      .def(
          "trim", [](Engine& self) { self.engine.trim(); }, Unlocked())
      .def(
          "record", [](Engine& self, bool on) { self.engine.record(on); }, "on"_a, Unlocked())
      .def(
          "take_events", &take_events,
          "(read, number of the reader or the lane, target, transfer, start, end, bytes) each; times in nanoseconds of "
          "the monotonic clock.");
}
