#include "native_debug.hpp"

#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>

#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <string_view>
#include <thread>

#include "host_memory.hpp"
#include "pool.hpp"
#include "python_stack.hpp"
#include "simulated_streams.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace glake {
namespace {

std::atomic<StackCapture> stack_capture{nullptr};
std::atomic<int> captures{0};  // going on now

struct CountCapture {
  CountCapture() noexcept { captures.fetch_add(1); }
  ~CountCapture() { captures.fetch_sub(1); }
};

constexpr int most_frames = 24;

bool is_finalizing() {
#if PY_VERSION_HEX >= 0x030D0000
  return Py_IsFinalizing() != 0;
#else
  return _Py_IsFinalizing() != 0;
#endif
}

// Of this package: glake_infer, or a module of it.
bool is_ours(PyFrameObject* frame) {
  const nb::object globals = nb::steal(PyFrame_GetGlobals(frame));
  const nb::handle module = PyDict_GetItemString(globals.ptr(), "__name__");  // borrowed; null without an error
  if (!module.is_valid() || !PyUnicode_Check(module.ptr())) return false;
  const char* text = PyUnicode_AsUTF8(module.ptr());
  if (text == nullptr) return false;
  const std::string_view name(text);
  return name == "glake_infer" || name.starts_with("glake_infer.");
}

std::string text_of(PyObject* code, const char* attribute) {
  const nb::object value = nb::steal(PyObject_GetAttrString(code, attribute));
  const char* text = value.is_valid() && PyUnicode_Check(value.ptr()) ? PyUnicode_AsUTF8(value.ptr()) : nullptr;
  PyErr_Clear();
  return text != nullptr ? text : "?";
}

std::string capture() {
  if (!Py_IsInitialized() || is_finalizing()) return "[no Python frames: the interpreter shuts down]";
  // A thread that Python does not know must not wait for the GIL (python_stack.hpp).
  if (PyGILState_GetThisThreadState() == nullptr) return "[no Python frames: called by a native thread]";
  const nb::gil_scoped_acquire locked;
  const nb::error_scope keep_the_error;
  std::string stack;
  int frames = 0;
  nb::object frame = nb::borrow(reinterpret_cast<PyObject*>(PyEval_GetFrame()));
  while (frame.is_valid() && frames < most_frames) {
    auto* current = reinterpret_cast<PyFrameObject*>(frame.ptr());
    if (frames != 0 || !is_ours(current)) {
      const nb::object code = nb::steal(reinterpret_cast<PyObject*>(PyFrame_GetCode(current)));
      if (frames++ != 0) stack += '\n';
      stack += text_of(code.ptr(), "co_filename") + ":" + std::to_string(PyFrame_GetLineNumber(current)) + " in " +
               text_of(code.ptr(), "co_qualname");
    }
    frame = nb::steal(reinterpret_cast<PyObject*>(PyFrame_GetBack(current)));
  }
  PyErr_Clear();
  return frames != 0 ? stack : "[no Python frames: called by a native thread]";
}

std::string label_text(std::uint32_t label, LabelName label_name) {
  if (label_name != nullptr) return label_name(label);
  return label == 0 ? std::string() : std::to_string(label);
}

nb::dict to_dict(const AllocationRecord& record, LabelName label_name) {
  nb::dict fields;
  fields["id"] = record.id;
  fields["address"] = record.address;
  fields["bytes"] = record.bytes;
  fields["tag"] = tag_name(record.tag);
  fields["label"] = label_text(record.label, label_name);
  if (record.stream == no_stream) {
    fields["stream"] = nb::none();
  } else {
    fields["stream"] = record.stream;
  }
  fields["thread"] = record.thread;
  fields["time_ns"] = record.time_ns;
  fields["stack"] = nb::str(record.stack.c_str());
  return fields;
}

}  // namespace

std::string capture_python_stack() noexcept {
  try {
    const CountCapture counted;  // before it asks: end_captures() waits for those that saw it set
    const StackCapture capture_now = stack_capture.load();
    return capture_now != nullptr ? capture_now() : "[no Python frames: no interpreter runs]";
  } catch (...) {
    return {};
  }
}

namespace {

// A thread that waits for the GIL when the interpreter goes is ended by it, in the midst of our code: so none may be
// waiting then. The GIL is held.
void end_captures() {
  set_stack_capture(nullptr);
  const nb::gil_scoped_release released;
  while (captures.load() != 0) std::this_thread::yield();
}

}  // namespace

void set_stack_capture(StackCapture capture_now) noexcept { stack_capture.store(capture_now); }

nb::list to_python(const std::vector<AllocationRecord>& records, LabelName label_name) {
  nb::list list;
  for (const AllocationRecord& record : records) list.append(to_dict(record, label_name));
  return list;
}

nb::list to_python(const std::vector<Corruption>& found, LabelName label_name) {
  nb::list list;
  for (const Corruption& corruption : found) {
    nb::dict fields;
    fields["kind"] = kind_name(corruption.kind);
    fields["found_at"] = found_name(corruption.found_at);
    fields["allocation"] = to_dict(corruption.allocation, label_name);
    if (corruption.freed) {
      fields["freed_thread"] = corruption.freed->thread;
      fields["freed_time_ns"] = corruption.freed->time_ns;
      fields["freed_stack"] = nb::str(corruption.freed->stack.c_str());
    }
    fields["offset"] = corruption.offset;
    fields["overwritten"] = corruption.overwritten;
    fields["extent"] = corruption.extent;
    fields["expected"] = corruption.expected;
    fields["found"] = nb::bytes(reinterpret_cast<const char*>(corruption.found.data()), corruption.found.size());
    fields["text"] = nb::str(describe(corruption, label_name).c_str());
    list.append(fields);
  }
  return list;
}

}  // namespace glake

namespace {

using glake::Address;
using glake::DebugHeap;
using glake::Tag;

// A debug heap over memory of its own, with the lock that the pool has. For tests.
class OwnDebugHeap {
 public:
  OwnDebugHeap(std::size_t limit, const std::string& mode, bool wipe, std::size_t quarantine,
               std::shared_ptr<glake::SimulatedStreams> device)
      : memory_(make_memory(std::move(device))), heap_(*memory_, options(limit, mode, wipe, quarantine)) {}

  Address allocate(std::size_t bytes, const std::string& tag_text, std::int64_t stream, std::uint32_t label) {
    const Tag tag = tag_text == "weights" ? Tag::weights : Tag::activations;
    std::string stack = glake::capture_python_stack();
    const std::scoped_lock lock(mutex_);
    const auto handle = stream < 0 ? glake::no_stream : static_cast<glake::StreamHandle>(stream);
    const Address address = heap_.allocate(bytes, tag, handle, label, std::move(stack));
    heap_.check_invariants();
    return address;
  }
  void deallocate(Address address) {
    std::string stack = glake::capture_python_stack();
    const std::scoped_lock lock(mutex_);
    heap_.deallocate(address, std::move(stack));
    heap_.check_invariants();
  }
  template <typename Action>
  auto locked(Action action) {
    const std::scoped_lock lock(mutex_);
    return action(heap_, *memory_);
  }

 private:
  static std::unique_ptr<glake::VirtualMemory> make_memory(std::shared_ptr<glake::SimulatedStreams> device) {
    if (device == nullptr) return std::make_unique<glake::HostMemory>();
    return glake::make_simulated_device(std::move(device));
  }
  static glake::DebugOptions options(std::size_t limit, const std::string& mode, bool wipe, std::size_t quarantine) {
    if (mode != "on" && mode != "guard") {
      throw nb::value_error(("unknown mode '" + mode + "': expected 'on' or 'guard'").c_str());
    }
    glake::DebugOptions chosen;
    chosen.guard_all = mode == "guard";
    chosen.wipe = wipe;
    chosen.limit = limit;
    chosen.quarantine = quarantine;
    return chosen;
  }

  std::mutex mutex_;
  std::unique_ptr<glake::VirtualMemory> memory_;
  DebugHeap heap_;
};

// Runs an action on the heap without the GIL.
template <typename Action>
auto unlocked(OwnDebugHeap& self, Action action) {
  const nb::gil_scoped_release released;
  return self.locked(action);
}

void translate(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const glake::CorruptionError& error) {
    const nb::object found = glake::to_python(error.found);
    const nb::object exception =
        nb::module_::import_("glake_infer.allocators.debugging").attr("corruption_error")(error.what(), found);
    PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(exception.ptr())), exception.ptr());
  }
}

nb::dict stats(OwnDebugHeap& self) {
  nb::dict fields;
  self.locked([&](DebugHeap& heap, glake::VirtualMemory& memory) {
    fields["reserved"] = heap.reserved();
    fields["active"] = heap.active();
    fields["requested"] = heap.requested();
    fields["weights"] = heap.active(Tag::weights);
    fields["limit"] = heap.limit();
    fields["live"] = heap.live_count();
    fields["slabs"] = heap.slabs();
    fields["pending"] = heap.pending();
    fields["quarantined"] = heap.quarantined();
    fields["driver_calls"] = memory.calls();
  });
  return fields;
}

// What a native thread runs in a test: returns the text, which stays.
void* native_stack_entry(void*) {
  static const std::string text = glake::capture_python_stack();
  return const_cast<char*>(text.c_str());
}

}  // namespace

void bind_debug(nb::module_& module) {
  nb::register_exception_translator(translate);
  using Unlocked = nb::call_guard<nb::gil_scoped_release>;

  nb::class_<OwnDebugHeap>(module, "DebugHeap",
                           "For tests: a debug heap over memory of its own: the host's, or a simulated device's.")
      .def(nb::init<std::size_t, const std::string&, bool, std::size_t, std::shared_ptr<glake::SimulatedStreams>>(),
           "limit"_a, "mode"_a = "on", "wipe"_a = false, "quarantine"_a = 1024, "device"_a = nb::none())
      .def("allocate", &OwnDebugHeap::allocate, "size"_a, "tag"_a = "activations", "stream"_a = -1, "label"_a = 0,
           "0 where the limit has no room.", Unlocked())
      .def("deallocate", &OwnDebugHeap::deallocate, "address"_a, Unlocked())
      .def(
          "check",
          [](OwnDebugHeap& self) {
            return glake::to_python(unlocked(self, [](DebugHeap& heap, auto&) { return heap.check(); }));
          },
          nb::sig("def check(self) -> list[dict[str, Any]]"))
      .def(
          "live",
          [](OwnDebugHeap& self) {
            return glake::to_python(unlocked(self, [](DebugHeap& heap, auto&) { return heap.live(); }));
          },
          nb::sig("def live(self) -> list[dict[str, Any]]"))
      .def(
          "trim",
          [](OwnDebugHeap& self, std::size_t target) {
            return unlocked(self, [=](DebugHeap& heap, auto&) { return heap.trim(target); });
          },
          "target"_a = 0)
      .def(
          "set_limit",
          [](OwnDebugHeap& self, std::size_t limit) {
            return unlocked(self, [=](DebugHeap& heap, auto&) { return heap.set_limit(limit); });
          },
          "limit"_a, "False, with the old limit in force, where more is active.")
      .def(
          "needed_limit",
          [](OwnDebugHeap& self, std::size_t bytes) {
            return unlocked(self, [=](DebugHeap& heap, auto&) { return heap.needed_limit(bytes, Tag::activations); });
          },
          "size"_a)
      .def("stats", &stats, nb::sig("def stats(self) -> dict[str, int]"))
      .def("check_invariants",
           [](OwnDebugHeap& self) { unlocked(self, [](DebugHeap& heap, auto&) { heap.check_invariants(); }); })
      .def(
          "inject_failure",
          [](OwnDebugHeap& self, std::int64_t n, std::int64_t times) {
            unlocked(self, [=](DebugHeap&, glake::VirtualMemory& memory) { memory.inject_failure(n, times); });
          },
          "n"_a, "times"_a = 1);

  module.def("capture_stack", &glake::capture_python_stack, Unlocked(),
             "Where this thread is: FILE:LINE in FUNCTION per line, innermost first.");

  module.def(
      "native_stack_entry", [] { return reinterpret_cast<Address>(&native_stack_entry); },
      "For tests: the address of a start routine for pthread_create that captures the stack.");

  // Until the interpreter begins to exit: threads that want the GIL after that never get it.
  glake::set_stack_capture(glake::capture);
  nb::module_::import_("atexit").attr("register")(nb::cpp_function(&glake::end_captures));
}
