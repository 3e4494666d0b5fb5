// _native: the Python face of the native core. Python's own Pool (pool.py) is a handle over it.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <new>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "host_memory.hpp"
#include "labels.hpp"
#include "native_debug.hpp"
#include "native_devices.hpp"
#include "native_errors.hpp"
#include "native_parts.hpp"
#include "native_transfers.hpp"
#include "pool.hpp"
#include "simulated_streams.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using glake::Address;
using glake::Pool;
using glake::PoolOptions;
using glake::StreamHandle;
using glake::Tag;
using glake::Weights;
using Unlocked = nb::call_guard<nb::gil_scoped_release>;

Tag parse_tag(const std::string& name) {
  for (std::size_t tag = 0; tag < glake::tag_count; ++tag) {
    if (name == glake::tag_name(static_cast<Tag>(tag))) return static_cast<Tag>(tag);
  }
  std::string known;
  for (std::size_t tag = 0; tag < glake::tag_count; ++tag) {
    known += (tag == 0 ? "'" : ", '") + std::string(glake::tag_name(static_cast<Tag>(tag))) + "'";
  }
  throw nb::value_error(("unknown tag '" + name + "': expected one of " + known).c_str());
}

PoolOptions parse_options(const std::string& debug, bool wipe, bool ignore_streams) {
  PoolOptions options;
  options.wipe = wipe;
  options.ignore_streams = ignore_streams;
  if (debug == "on") {
    options.debug = PoolOptions::Debug::on;
  } else if (debug == "guard") {
    options.debug = PoolOptions::Debug::guard;
  } else if (debug != "off") {
    throw nb::value_error(("unknown debug mode '" + debug + "': expected 'off', 'on' or 'guard'").c_str());
  }
  return options;
}

// -1 stands for "no stream" in Python.
std::int64_t to_python(StreamHandle stream) { return static_cast<std::int64_t>(stream); }

nb::dict stats(Pool& pool) {
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
  fields["peak_requested"] = stats.peak_requested;
  fields["limit"] = stats.limit;
  fields["weights"] = stats.weights;
  fields["mapped_files"] = stats.mapped_files;
  fields["unused_weights"] = stats.unused_weights;
  fields["shared"] = stats.shared;
  fields["offloaded"] = stats.offloaded;
  fields["allocations"] = stats.allocations;
  fields["deallocations"] = stats.deallocations;
  fields["chunks"] = stats.chunks;
  fields["mappings"] = stats.mappings;
  fields["ranges"] = stats.ranges;
  fields["slabs"] = stats.slabs;
  fields["arenas"] = stats.arenas;
  fields["stitches"] = stats.stitches;
  fields["driver_calls"] = stats.driver_calls;
  return fields;
}

bool is_finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

bool share(Pool& pool, nb::object grower, int gone_event) {
  // The native pool may outlive the interpreter.
  const std::shared_ptr<PyObject> kept(grower.release().ptr(), [](PyObject* object) {
    if (Py_IsInitialized() == 0 || is_finalizing()) return;
    const nb::gil_scoped_acquire locked;
    Py_DECREF(object);
  });
  const auto asks = [kept](std::size_t quota, bool full) -> std::string {
    if (Py_IsInitialized() == 0 || is_finalizing()) return "the process is ending.";
    const nb::gil_scoped_acquire locked;
    try {
      return nb::cast<std::string>(nb::handle(kept.get())(quota, full));
    } catch (const nb::python_error& error) {
      if (error.matches(PyExc_KeyboardInterrupt)) PyErr_SetInterrupt();  // the main thread's, when this has returned
      return error.what();
    }
  };
  const nb::gil_scoped_release unlocked;
  return pool.share(asks, gone_event);
}

Weights::Kind parse_kind(const std::string& kind) {
  if (kind == "file") return Weights::Kind::file;
  if (kind == "shared") return Weights::Kind::shared;
  if (kind == "memory") return Weights::Kind::memory;
  throw nb::value_error("kind: expected 'memory', 'file' or 'shared'");
}

// Lets Ctrl-C end a wait.
void check_signals() {
  const nb::gil_scoped_acquire locked;
  if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

nb::dict user(const Pool& pool, Weights::Id id) {
  Weights::UserView view;
  {
    const nb::gil_scoped_release unlocked;
    view = pool.user(id);
  }
  nb::dict fields;
  fields["bytes"] = view.bytes;
  fields["missing"] = view.missing;
  fields["missing_on_host"] = view.missing_on_host;
  fields["busy"] = view.busy;
  fields["awake"] = view.awake;
  fields["evictable"] = view.evictable;
  fields["priority"] = view.priority;
  fields["idle_seconds"] = view.idle_seconds;
  return fields;
}

nb::list holders(const Pool& pool) {
  std::vector<glake::Holder> holders;
  {
    const nb::gil_scoped_release unlocked;
    holders = pool.holders();
  }
  nb::list list;
  for (const glake::Holder& holder : holders) {
    list.append(nb::make_tuple(holder.label, glake::tag_name(holder.tag), holder.bytes));
  }
  return list;
}

nb::list stop_recording(Pool& pool) {
  std::vector<glake::TraceEvent> events;
  {
    const nb::gil_scoped_release unlocked;
    events = pool.stop_recording();
  }
  nb::list list;
  for (const glake::TraceEvent& event : events) {
    list.append(nb::make_tuple(std::string(1, event.op), event.time_ns, event.address, event.bytes,
                               to_python(event.stream), glake::tag_name(static_cast<Tag>(event.tag)),
                               glake::label_name(event.label), event.id));
  }
  return list;
}

nb::dict snapshot(const Pool& pool) {
  std::vector<glake::SegmentView> views;
  {
    const nb::gil_scoped_release unlocked;
    views = pool.snapshot();
  }
  nb::list segments;
  for (const glake::SegmentView& view : views) {
    nb::list ranges;
    for (const glake::RangeView& range : view.ranges) {
      nb::dict fields;
      fields["address"] = range.address;
      fields["bytes"] = range.bytes;
      fields["requested"] = range.requested;
      fields["state"] = range.state;
      fields["tag"] = glake::tag_name(range.tag);
      fields["label"] = range.label;
      ranges.append(fields);
    }
    nb::dict fields;
    fields["address"] = view.address;
    fields["bytes"] = view.bytes;
    fields["kind"] = view.kind;
    fields["arena"] = view.arena;
    fields["stream"] = to_python(view.stream);
    fields["ranges"] = ranges;
    segments.append(fields);
  }
  nb::dict all;
  all["segments"] = segments;
  return all;
}

}  // namespace

NB_MODULE(_native, module) {
  module.doc() = "The native core of glake_infer.allocators. Private: use glake_infer.Pool.";
  nb::register_exception_translator(glake::python::translate);
  bind_devices(module);
  bind_transfers(module);
  bind_debug(module);

  nb::class_<Pool>(module, "Pool", "A pool of host memory of its own. The pool of a device is device_pool().")
      .def(
          "__init__",
          [](Pool* self, std::size_t limit) { new (self) Pool(std::make_unique<glake::HostMemory>(), limit); },
          "limit"_a)
      .def_static(
          "simulated",
          [](std::shared_ptr<glake::SimulatedStreams> device, std::size_t limit) {
            return std::make_unique<Pool>(glake::make_simulated_device(std::move(device)), limit);
          },
          "device"_a, "limit"_a, "For tests: a pool on a simulated device.")
      .def(
          "configure",
          [](Pool& self, const std::string& debug, bool wipe, bool ignore_streams) {
            const PoolOptions options = parse_options(debug, wipe, ignore_streams);
            const nb::gil_scoped_release unlocked;
            self.configure(options);
          },
          "debug"_a = "off", "wipe"_a = false, "ignore_streams"_a = false)
      .def(
          "allocate",
          [](Pool& self, std::size_t bytes, const std::string& tag, std::int64_t stream) {
            const Tag parsed = parse_tag(tag);
            const nb::gil_scoped_release unlocked;
            try {
              return self.allocate(bytes, parsed, static_cast<StreamHandle>(stream));
            } catch (
                const std::bad_alloc&) {  // as where mappings run out, if the pool's tables need the last one first
              throw glake::DriverError(
                  "taking memory for the pool's own tables failed (ENOMEM). Either the machine is out of memory, or "
                  "this "
                  "process has too many mappings (vm.max_map_count): raise it, or hold fewer blocks at once.");
            }
          },
          "size"_a, "tag"_a = "activations", "stream"_a = -1)
      .def(
          "deallocate",
          [](Pool& self, Address address, std::int64_t stream) {
            self.deallocate(address, static_cast<StreamHandle>(stream));
          },
          "address"_a, "stream"_a = -1, Unlocked())
      .def("map_file", &Pool::map_file, "descriptor"_a, "size"_a, Unlocked())
      .def("unmap_file", &Pool::unmap_file, "address"_a, Unlocked())
      .def(
          "place_weights",
          [](Pool& self, const std::vector<std::tuple<std::size_t, std::size_t, Weights::Id, bool>>& pieces,
             const std::string& kind, bool on_host, const std::string& tag) {
            std::vector<Weights::Piece> parsed;
            for (const auto& [bytes, requested, shared, adds] : pieces) {
              parsed.push_back({bytes, requested, shared, adds, on_host});
            }
            const auto place = self.place_weights(parsed, parse_kind(kind), parse_tag(tag));
            return std::make_tuple(place.region, place.address, place.chunks);
          },
          "pieces"_a, "kind"_a, "on_host"_a = false, "tag"_a = "weights",
          "(bytes, bytes of weights in it, a chunk to share or 0, whether beside others' weights) each.", Unlocked())
      .def("remove_region", &Pool::remove_region, "region"_a, Unlocked())
      .def("replace", &Pool::replace, "region"_a, "index"_a, "chunk"_a, Unlocked())
      .def("resident_in", &Pool::resident_in, "region"_a, Unlocked())
      .def(
          "add_user",
          [](Pool& self, const std::vector<Weights::Id>& chunks, bool evictable, int priority) {
            return self.add_user(chunks, evictable, priority);
          },
          "chunks"_a, "evictable"_a = false, "priority"_a = 0, Unlocked())
      .def("remove_user", &Pool::remove_user, "user"_a, Unlocked())
      .def("set_policy", &Pool::set_policy, "user"_a, "evictable"_a, "priority"_a, Unlocked())
      .def("user", &user, "user"_a, nb::sig("def user(self, user: int) -> dict[str, Any]"))
      .def(
          "begin_use",
          [](Pool& self, Weights::Id user, bool later) { return self.begin_use(user, later, &check_signals); },
          "user"_a, "later"_a = false, "Returns the chunks to load; with `later` make() gives them memory.", Unlocked())
      .def("address_of", &Pool::address_of, "chunk"_a, Unlocked())
      .def("size_of", &Pool::size_of, "chunk"_a, Unlocked())
      .def("handle_of", &Pool::handle_of, "chunk"_a, Unlocked())
      .def("begin_writing", &Pool::begin_writing, "chunk"_a, Unlocked())
      .def("end_writing", &Pool::end_writing, "chunk"_a, "address"_a, Unlocked())
      .def("map_weights", &Pool::map_weights, "chunk"_a, "descriptor"_a, "size"_a, Unlocked())
      .def(
          "make", [](Pool& self, const std::vector<Weights::Id>& chunks) { self.make(chunks); }, "chunks"_a, Unlocked())
      .def("unmake", &Pool::unmake, "chunk"_a, Unlocked())
      .def(
          "freeze", [](Pool& self, const std::vector<Weights::Id>& chunks) { self.freeze(chunks); }, "chunks"_a,
          Unlocked())
      .def("adopt", &Pool::adopt, "chunk"_a, "descriptor"_a, Unlocked())
      .def("descriptor", &Pool::descriptor, "chunk"_a, Unlocked())
      .def(
          "take_gone",
          [](Pool& self) {
            std::vector<std::pair<Weights::Id, bool>> gone;
            for (const Weights::Gone& each : self.take_gone()) gone.emplace_back(each.chunk, each.drop);
            return gone;
          },
          "(chunk, whether its memory is to go) each.", Unlocked())
      .def(
          "offers",
          [](const Pool& self) {
            std::vector<std::tuple<Weights::Id, bool, int, double>> offers;
            for (const Weights::Offer& each : self.offers()) {
              offers.emplace_back(each.chunk, each.awake, each.priority, each.idle_seconds);
            }
            return offers;
          },
          "(chunk, awake, priority, idle seconds) each.", Unlocked())
      .def("shared_busy", &Pool::shared_busy, Unlocked())
      .def("running", &Pool::running, Unlocked())
      .def(
          "give_up", [](Pool& self, const std::vector<Weights::Id>& chunks) { return self.give_up(chunks); },
          "chunks"_a, Unlocked())
      .def("share", &share, "grower"_a, "gone_event"_a,
           nb::sig("def share(self, grower: Any, gone_event: int) -> bool"))
      .def("unshare", &Pool::unshare, "gone_event"_a, Unlocked())
      .def("set_quota", &Pool::set_quota, "quota"_a, Unlocked())
      .def(
          "loaded",
          [](Pool& self, Weights::Id user, const std::vector<Weights::Id>& chunks, bool writable) {
            self.loaded(user, chunks, writable);
          },
          "user"_a, "chunks"_a, "writable"_a = false, Unlocked())
      .def(
          "load_failed",
          [](Pool& self, Weights::Id user, const std::vector<Weights::Id>& chunks) { self.load_failed(user, chunks); },
          "user"_a, "chunks"_a, Unlocked())
      .def("end_use", &Pool::end_use, "user"_a, Unlocked())
      .def("touch", &Pool::touch, "user"_a, Unlocked())
      .def(
          "absent", [](const Pool& self, const std::vector<Weights::Id>& chunks) { return self.absent(chunks); },
          "chunks"_a, Unlocked())
      .def(
          "suspend", [](Pool& self, Weights::Id user) { return self.suspend(user, &check_signals); }, "user"_a,
          Unlocked())
      .def_prop_ro("granularity", &Pool::granularity)
      .def_prop_ro("granularity_on_host", &Pool::granularity_on_host, "0 where the device maps no memory of the host.")
      .def(
          "room_for",
          [](Pool& self, const std::vector<Weights::Id>& chunks) {
            const Pool::Room found = self.room_for(chunks);
            return std::make_pair(found.missing, found.room);
          },
          "chunks"_a, "(bytes that are missing, bytes that there is room for).", Unlocked())
      .def("trim", &Pool::trim, "target"_a = 0, Unlocked())
      .def("set_limit", &Pool::set_limit, "limit"_a, Unlocked())
      .def("expect_captures", &Pool::expect_captures, "on"_a, Unlocked())
      .def("captures_ended", &Pool::captures_ended, Unlocked())
      .def("stats", &stats, nb::sig("def stats(self) -> dict[str, int]"))
      .def("holders", &holders, nb::sig("def holders(self) -> list[tuple[str, str, int]]"))
      .def("reset_peaks", &Pool::reset_peaks, Unlocked())
      .def("start_recording", &Pool::start_recording, "most_events"_a, Unlocked())
      .def("stop_recording", &stop_recording,
           nb::sig("def stop_recording(self) -> list[tuple[str, int, int, int, int, str, str, int]]"))
      .def("snapshot", &snapshot, nb::sig("def snapshot(self) -> dict[str, Any]"))
      .def(
          "check", [](Pool& self) { return glake::to_python(self.check(), &glake::label_name); },
          nb::sig("def check(self) -> list[dict[str, Any]]"))
      .def(
          "live", [](const Pool& self) { return glake::to_python(self.live(), &glake::label_name); },
          nb::sig("def live(self) -> list[dict[str, Any]]"))
      .def("check_invariants", &Pool::check_invariants, Unlocked())
      .def("inject_failure", &Pool::inject_failure, "n"_a, "times"_a = 1,
           "For tests: n coming driver calls pass, and the `times` after them fail; a negative n disarms.", Unlocked());

  module.def(
      "set_label", [](const std::string& name) { glake::set_thread_label(glake::label_of(name)); }, "name"_a,
      "Names the holder of what this thread allocates from now on; empty for none.");

  glake::python::bind_ort(module);
  bind_bench(module);
}
