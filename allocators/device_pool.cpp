#include "device_pool.hpp"

#include <array>
#include <atomic>
#include <charconv>
#include <mutex>

#include "arithmetic.hpp"
#include "cuda_memory.hpp"
#include "host_memory.hpp"

namespace glake {
namespace {

constexpr int most_cuda_devices = 64;

// Plain pointers, read without a lock: static objects would be destroyed at exit, and a lock could be held by
// another thread when this process is forked.
std::array<std::atomic<OrtDeviceAllocator*>, 1 + most_cuda_devices> allocators{};
std::mutex making;

// Null for an index that no device can have.
std::atomic<OrtDeviceAllocator*>* place(const Device& device) noexcept {
  if (device.kind == Device::cpu) return allocators.data();
  if (device.index < 0 || device.index >= most_cuda_devices) return nullptr;
  return &allocators[static_cast<std::size_t>(1 + device.index)];
}

}  // namespace

std::optional<Device> parse_device(const std::string& name) {
  if (name == "cpu") return Device{};
  if (!name.starts_with("cuda:")) return std::nullopt;
  Device device{Device::cuda, 0};
  const char* const end = name.data() + name.size();
  const auto [stop, error] = std::from_chars(name.data() + 5, end, device.index);
  if (error != std::errc() || stop != end || device.index < 0) return std::nullopt;
  return device;
}

std::string device_name(const Device& device) {
  return device.kind == Device::cpu ? "cpu" : "cuda:" + std::to_string(device.index);
}

std::unique_ptr<VirtualMemory> open_device(const Device& device) {
  if (device.kind == Device::cpu) return std::make_unique<HostMemory>();
  return std::make_unique<CudaMemory>(device.index);
}

std::size_t device_memory(const Device& device) { return cuda_device_memory(device.index); }

OrtDeviceAllocator* existing_allocator(const Device& device) noexcept {
  const auto* const slot = place(device);
  return slot == nullptr ? nullptr : slot->load(std::memory_order_acquire);
}

OrtDeviceAllocator& device_allocator(const Device& device) {
  if (OrtDeviceAllocator* found = existing_allocator(device)) return *found;
  auto* const slot = place(device);
  if (slot == nullptr) {
    throw DriverError("opening device " + device_name(device) +
                      " failed: CUDA devices are numbered from 0 to at most " + std::to_string(most_cuda_devices - 1));
  }
  const std::scoped_lock lock(making);
  if (OrtDeviceAllocator* found = slot->load(std::memory_order_acquire)) return *found;
  auto pool = std::make_unique<Pool>(open_device(device), most_bytes);
  auto made = std::make_unique<OrtDeviceAllocator>(*pool, device);
  pool.release();  // NOLINT: for ever
  slot->store(made.get(), std::memory_order_release);
  return *made.release();
}

}  // namespace glake
