// Slabs: small objects that share blocks.
//
// A slab is an active block cut into objects of one size class and one tag. Which objects are free is
// kept outside the memory itself (device memory cannot be read from here). A slab that has no live
// object goes back to the BlockPool at once, where its memory is idle.
//
// A class begins with a slab for one object and doubles with demand, so that a size that occurs once
// does not pin memory for eight. Where the limit leaves no room for the slab that demand would
// justify, one for a single object is tried before the request fails.
//
// Not thread-safe: Pool locks.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "block_pool.hpp"
#include "size_classes.hpp"

namespace glake {

struct Slab {
  Block* block = nullptr;
  std::size_t class_index = 0;
  std::size_t object_bytes = 0;
  std::size_t capacity = 0;              // objects
  std::size_t live = 0;                  // objects handed out
  std::vector<std::uint64_t> free;       // one bit per object, set while it is free
  std::vector<std::uint32_t> requested;  // per live object: bytes as asked for
  Link<Slab> partial_link;               // in the list of slabs that have a free object
};

class Slabs {
 public:
  explicit Slabs(BlockPool& blocks) : blocks_(blocks) {}
  Slabs(const Slabs&) = delete;
  Slabs& operator=(const Slabs&) = delete;

  // An object of `bytes` (1 to small_limit); 0 when the limit does not allow it. Throws DriverError.
  [[nodiscard]] Address allocate(std::size_t bytes, Tag tag);
  // The slab that this address lies in, or null.
  [[nodiscard]] Slab* find(Address address) const noexcept;
  // Whether the address is that of a live object of the slab.
  [[nodiscard]] static bool is_live(const Slab& slab, Address address) noexcept;
  // Frees a live object; returns the bytes that were asked for it.
  std::size_t deallocate(Slab& slab, Address address) noexcept;

  // What an object of `bytes` adds to the active bytes if no slab has room for it.
  [[nodiscard]] std::size_t smallest_slab(std::size_t bytes) const noexcept;
  // Bytes of the slabs of a tag.
  [[nodiscard]] std::size_t active(Tag tag) const noexcept { return active_[static_cast<std::size_t>(tag)]; }
  [[nodiscard]] std::size_t count() const noexcept { return slabs_.size(); }
  void check_invariants() const;

 private:
  using Partial = IntrusiveList<Slab, &Slab::partial_link>;
  struct Class {
    Partial partial;
    std::size_t live = 0;  // objects, in all its slabs
  };

  [[nodiscard]] Slab* make(std::size_t class_index, Tag tag);
  void destroy(Slab& slab) noexcept;

  BlockPool& blocks_;
  std::array<std::array<Class, size_classes::count>, tag_count> classes_;
  std::array<std::size_t, tag_count> active_{};
  std::unordered_map<Block*, std::unique_ptr<Slab>> slabs_;
  std::unordered_map<std::size_t, Slab*> by_granule_;  // address / granule -> the slab that covers it
};

}  // namespace glake
