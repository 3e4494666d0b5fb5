// The pools of the devices: one per device and process, made on first use and never destroyed.
//
// ONNX Runtime keeps raw pointers to its allocators, and sessions may be alive when the interpreter
// exits: at that point memory is leaked to the system rather than pulled from under them.
#pragma once

#include <compare>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>

#include "ort_allocator.hpp"
#include "virtual_memory.hpp"

namespace glake {

struct Device {
  enum Kind { cpu, cuda };
  Kind kind = cpu;
  int index = 0;  // of CUDA's, as the driver counts in this process; 0 for the host
  auto operator<=>(const Device&) const = default;
};

// "cpu", "cuda:0". Nothing for any other text ("cuda" alone, too: devices.py resolves that).
[[nodiscard]] std::optional<Device> parse_device(const std::string& name);
[[nodiscard]] std::string device_name(const Device& device);

// The memory of a device, for a pool to own. Throws DriverError.
[[nodiscard]] std::unique_ptr<VirtualMemory> open_device(const Device& device);
// All the memory that a CUDA device has, in bytes. Throws DriverError. (The host's: devices.py.)
[[nodiscard]] std::size_t device_memory(const Device& device);

// Thread-safe. Made with no limit: its Python handle sets one. Throws DriverError; then the next call tries again.
// A child of fork() gets its parent's, whose pool then throws ForkedProcess.
[[nodiscard]] OrtDeviceAllocator& device_allocator(const Device& device);
// The pool that device_allocator() made, or null: a look that makes nothing.
[[nodiscard]] OrtDeviceAllocator* existing_allocator(const Device& device) noexcept;

}  // namespace glake
