// Chunk and Block: the two records that the pool keeps. The words are defined in pool.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <utility>
#include <vector>

#include "intrusive_list.hpp"
#include "virtual_memory.hpp"

namespace glake {

struct Block;
struct Slab;

// Who holds memory, for the error that has to name the holders.
enum class Tag : std::uint8_t { activations, weights };
inline constexpr std::size_t tag_count = 2;
[[nodiscard]] constexpr const char* tag_name(Tag tag) noexcept {
  return tag == Tag::weights ? "weights" : "activations";
}

// One piece of physical memory.
struct Chunk {
  Chunk(VirtualMemory& memory, std::size_t bytes) : physical(memory, bytes) {}

  PhysicalMemory physical;
  bool active = false;            // in an active block (the only one of `mapped_in` that is active)
  std::vector<Block*> mapped_in;  // every block that maps this chunk
  Link<Chunk> idle_link;          // in the list of idle chunks of this size: oldest first
  std::list<Chunk>::iterator self;

  [[nodiscard]] std::size_t bytes() const noexcept { return physical.handle().bytes; }
};

// An address range with chunks mapped in it, back to back.
struct Block {
  explicit Block(MappedRange mapped_range) : range(std::move(mapped_range)) {}

  MappedRange range;
  std::vector<Chunk*> chunks;     // in the order of their addresses
  bool active = false;            // handed out
  bool stitched = false;          // some of its chunks served other blocks before
  Tag tag = Tag::activations;     // while active: who holds it
  std::size_t requested = 0;      // while active and not a slab: bytes as asked for
  Slab* slab = nullptr;           // while active: the slab that it serves, if any
  std::size_t active_chunks = 0;  // chunks in use by another block; 0 = this block can be handed out
  Link<Block> available_link;     // in the list of inactive blocks of this size whose chunks are all idle
  Link<Block> inactive_link;      // in the list of all inactive blocks: least recently used first
  std::list<Block>::iterator self;

  [[nodiscard]] Address address() const noexcept { return range.address(); }
  [[nodiscard]] std::size_t bytes() const noexcept { return range.bytes(); }
};

}  // namespace glake
