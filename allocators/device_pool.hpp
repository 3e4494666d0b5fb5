// The pool of a device: one per process, made on first use and never destroyed.
//
// ONNX Runtime keeps raw pointers to its allocator, and sessions may be alive when the interpreter
// exits: at that point memory is leaked to the system rather than pulled from under them.
#pragma once

#include "ort_allocator.hpp"

namespace glake {

// The host's. Made with no limit: its Python handle sets one. Throws DriverError; then the next call tries again.
[[nodiscard]] OrtDeviceAllocator& host_allocator();

}  // namespace glake
