// The Python face of the debug heap, for native.cpp: bindings, and records as Python sees them.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>
#include <vector>

#include "debug_heap.hpp"

namespace glake {

using LabelName = std::string (*)(std::uint32_t);

// As keyword arguments of debugging.Allocation and debugging.Corruption. The GIL must be held.
[[nodiscard]] nanobind::list to_python(const std::vector<AllocationRecord>& records, LabelName label_name = nullptr);
[[nodiscard]] nanobind::list to_python(const std::vector<Corruption>& found, LabelName label_name = nullptr);

}  // namespace glake

// Adds DebugHeap and capture_stack(), makes CorruptionError a MemoryCorruptionError, and sets what
// capture_python_stack() calls until the interpreter exits.
void bind_debug(nanobind::module_& module);
