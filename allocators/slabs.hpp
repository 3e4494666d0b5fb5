// Slabs: small objects that share ranges.
//
// A slab is a range cut into objects of one size class, for one arena. Which objects are free is kept outside the
// memory itself (device memory cannot be read from here). A slab without a live object is vacant: it serves the next
// object of its class, and goes back to its heap when anything is flushed.
//
// A class begins with a slab of one step (Arena::slab_step) and doubles with demand, so that a size that occurs once
// does not pin memory for eight. Where the limit leaves no room for the slab that demand would justify, a small one
// is tried before the request fails.
//
// Not thread-safe: Pool locks.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "heap.hpp"
#include "size_classes.hpp"

namespace glake {

// What is handed out, in bytes.
struct Usage {
  std::size_t active = 0;  // ranges in use; a slab counts whole while it has a live object
  std::size_t peak_active = 0;
  std::size_t requested = 0;  // as asked for
  std::size_t peak_requested = 0;

  void add(std::size_t bytes) noexcept {
    active += bytes;
    if (active > peak_active) peak_active = active;
  }
  void request(std::size_t bytes) noexcept {
    requested += bytes;
    if (requested > peak_requested) peak_requested = requested;
  }
};

struct Slab {
  struct Object {
    std::uint32_t requested = 0;  // bytes as asked for
    std::uint32_t holder = 0;
    std::uint64_t born = 0;  // how many allocations there had been
  };
  Range* range = nullptr;
  Arena* arena = nullptr;
  std::size_t class_index = 0;
  std::uint32_t object_bytes = 0;
  std::uint32_t capacity = 0;       // objects
  std::size_t live = 0;             // objects handed out
  std::vector<std::uint64_t> free;  // one bit per object, set while it is free
  std::vector<Object> objects;      // of the live ones
  std::vector<Fence> fences;        // of the free ones, where the arena has no stream: work that may still touch them
  Fence fence = 0;                  // the latest of them
  Link<Slab> partial_link;          // in the list of slabs that have a free object

  static constexpr std::size_t nothing = ~std::size_t{0};
  // The number of the live object at this address, or `nothing`.
  [[nodiscard]] std::size_t live_at(Address address) const noexcept {
    const auto offset = static_cast<std::uint32_t>(address - range->address);  // slabs are small: this divides faster
    const std::uint32_t object = offset / object_bytes;
    if (object * object_bytes != offset || object >= capacity) return nothing;
    return (free[object / 64] >> (object % 64) & 1) == 0 ? object : nothing;
  }
};

// Slabs by address: every step of a slab's range points to it.
using SlabTable = std::unordered_map<Address, Slab*>;

// Where slabs get their ranges from, with everything that the pool does to find one. Null if the limit has no room.
class RangeSource {
 public:
  [[nodiscard]] virtual Range* acquire(Heap& heap, std::size_t bytes) = 0;

 protected:
  ~RangeSource() = default;
};

class Slabs {
 public:
  explicit Slabs(Arena& arena) : arena_(arena) {}
  Slabs(const Slabs&) = delete;
  Slabs& operator=(const Slabs&) = delete;

  struct Place {
    Slab* slab = nullptr;  // null: the limit does not allow it
    std::size_t object = 0;
  };
  // An object of `bytes` (1 to small_limit - 1). Throws DriverError.
  [[nodiscard]] Place allocate(std::size_t bytes, std::uint32_t holder, std::uint64_t born, RangeSource& source,
                               SlabTable& table, Usage& usage);
  // Frees a live object, which work behind `fence` may still touch.
  void deallocate(Slab& slab, std::size_t object, Fence fence, Usage& usage);
  // Gives the ranges of vacant slabs back to the heap.
  void flush(SlabTable& table) noexcept;

  [[nodiscard]] std::size_t count() const noexcept { return slabs_.size() - vacant_; }
  // Bytes of the slabs that have a live object.
  [[nodiscard]] std::size_t active() const noexcept { return active_; }
  void check_invariants(const SlabTable& table) const;

 private:
  using Partial = IntrusiveList<Slab, &Slab::partial_link>;
  struct Class {
    Partial partial;
    std::size_t live = 0;  // objects, in all its slabs
  };

  [[nodiscard]] Slab* make(std::size_t class_index, RangeSource& source, SlabTable& table);

  Arena& arena_;
  std::array<Class, size_classes::count> classes_;
  std::unordered_map<const Range*, std::unique_ptr<Slab>> slabs_;
  std::size_t vacant_ = 0;  // slabs
  std::size_t active_ = 0;
};

}  // namespace glake
