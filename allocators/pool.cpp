#include "pool.hpp"

#include <cstdlib>
#include <limits>
#include <string>
#include <utility>

namespace glake {
namespace {

constexpr std::size_t page = 4096;
constexpr std::size_t most = std::numeric_limits<std::size_t>::max();

// Rounds up; the largest multiple where that would overflow.
std::size_t round_up(std::size_t bytes, std::size_t step) {
  return bytes > most - step ? most / step * step : (bytes + step - 1) / step * step;
}

std::string hexadecimal(Address address) {
  constexpr const char* digits = "0123456789abcdef";
  std::string text;
  do {
    text.insert(text.begin(), digits[address % 16]);
    address /= 16;
  } while (address != 0);
  return "0x" + text;
}

}  // namespace

// What every public function does first and last: refuse the child of a fork, lock, verify.
class Pool::Operation {
 public:
  explicit Operation(const Pool& pool) : lock_(owned(pool).mutex_) {}

 private:
  static const Pool& owned(const Pool& pool) {
    if (pool.process_.is_child()) throw ForkedProcess();
    return pool;
  }
  std::scoped_lock<std::mutex> lock_;
};

Pool::Pool(std::unique_ptr<VirtualMemory> memory, std::size_t limit)
    : always_verify_(std::getenv("GLAKE_CHECK_INVARIANTS") != nullptr),
      memory_(std::move(memory)),
      blocks_(std::make_unique<BlockPool>(*memory_, limit)),
      slabs_(std::make_unique<Slabs>(*blocks_)) {
#ifndef NDEBUG
  always_verify_ = true;
#endif
}

Pool::~Pool() {
  for (const auto& [address, bytes] : files_) memory_->unmap_file(address, bytes);
}

Address Pool::allocate(std::size_t bytes, Tag tag, StreamHandle /*stream*/) {
  if (bytes == 0) return 0;
  const Operation operation(*this);
  Address address = 0;
  if (bytes < small_limit) {
    address = slabs_->allocate(bytes, tag);
    if (address == 0) throw_out_of_memory(bytes, slabs_->smallest_slab(bytes));
  } else {
    const std::size_t block_bytes = round_up(bytes, blocks_->granule());
    Block* block = blocks_->acquire(block_bytes);
    if (block == nullptr) throw_out_of_memory(bytes, block_bytes);
    block->tag = tag;
    block->requested = bytes;
    large_[static_cast<std::size_t>(tag)] += block->bytes();
    address = block->address();
  }
  requested_ += bytes;
  ++allocations_;
  verify();
  return address;
}

void Pool::deallocate(Address address) {
  if (address == 0) return;
  const Operation operation(*this);
  if (Slab* slab = slabs_->find(address)) {
    if (!Slabs::is_live(*slab, address)) {
      throw InvalidPointer("address " + hexadecimal(address) +
                           " is inside a slab but is no live object of it: freed twice, or not the address that was "
                           "handed out");
    }
    requested_ -= slabs_->deallocate(*slab, address);
  } else {
    Block* block = blocks_->find(address);
    if (block == nullptr) {
      throw InvalidPointer("address " + hexadecimal(address) +
                           " does not belong to this pool: it was never handed out, or freed long ago");
    }
    if (!block->active)
      throw InvalidPointer("address " + hexadecimal(address) + " is not in use: it was freed already");
    large_[static_cast<std::size_t>(block->tag)] -= block->bytes();
    requested_ -= block->requested;
    blocks_->release(*block);
  }
  ++deallocations_;
  verify();
}

Address Pool::map_file(int descriptor, std::size_t bytes) {
  const Operation operation(*this);
  if (bytes == 0) throw DriverError("mapping 0 bytes of a file failed: an empty file cannot be mapped");
  const std::size_t pages = round_up(bytes, page);
  if (!blocks_->pin(pages)) throw_out_of_memory(bytes, pages);
  Address address = 0;
  try {
    address = memory_->map_file(descriptor, bytes);
    files_.emplace(address, bytes);
  } catch (...) {
    if (address != 0) memory_->unmap_file(address, bytes);
    blocks_->unpin(pages);
    throw;
  }
  file_bytes_ += pages;
  requested_ += bytes;
  verify();
  return address;
}

void Pool::unmap_file(Address address) {
  const Operation operation(*this);
  const auto found = files_.find(address);
  if (found == files_.end()) {
    throw InvalidPointer("address " + hexadecimal(address) +
                         " is not that of a mapped file of this pool: never mapped, or unmapped already");
  }
  const std::size_t bytes = found->second;
  memory_->unmap_file(address, bytes);
  files_.erase(found);
  blocks_->unpin(round_up(bytes, page));
  file_bytes_ -= round_up(bytes, page);
  requested_ -= bytes;
  verify();
}

std::size_t Pool::trim(std::size_t target) {
  const Operation operation(*this);
  const std::size_t given_back = blocks_->trim(target);
  verify();
  return given_back;
}

void Pool::set_limit(std::size_t limit) {
  const Operation operation(*this);
  if (!blocks_->set_limit(limit)) throw LimitTooLow(limit, blocks_->active());
  verify();
}

std::size_t Pool::held(Tag tag) const noexcept {
  return large_[static_cast<std::size_t>(tag)] + slabs_->active(tag) + (tag == Tag::weights ? file_bytes_ : 0);
}

PoolStats Pool::stats() const {
  // A child must not wait for a lock that a thread of the parent held when it forked.
  std::unique_lock lock(mutex_, std::defer_lock);
  if (!process_.is_child()) lock.lock();
  PoolStats stats;
  stats.active = blocks_->active();
  stats.idle = blocks_->idle();
  stats.reserved = blocks_->reserved();
  stats.peak_active = blocks_->peak_active();
  stats.peak_reserved = blocks_->peak_reserved();
  stats.requested = requested_;
  stats.limit = blocks_->limit();
  stats.weights = held(Tag::weights);
  stats.mapped_files = file_bytes_;
  stats.allocations = allocations_;
  stats.deallocations = deallocations_;
  stats.chunks = blocks_->chunks();
  stats.blocks = blocks_->blocks();
  stats.stitched_blocks = blocks_->stitched_blocks();
  stats.slabs = slabs_->count();
  stats.driver_calls = memory_->calls();
  return stats;
}

void Pool::reset_peaks() {
  const Operation operation(*this);
  blocks_->reset_peaks();
}

void Pool::inject_failure(std::int64_t n, std::int64_t times) {
  const Operation operation(*this);
  memory_->inject_failure(n, times);
}

void Pool::throw_out_of_memory(std::size_t requested, std::size_t block_bytes) const {
  OutOfMemory record;
  record.requested = requested;
  record.active = blocks_->active();
  record.idle = blocks_->idle();
  record.reserved = blocks_->reserved();
  record.limit = blocks_->limit();
  record.needed_limit = block_bytes > most - record.active ? most : record.active + block_bytes;
  record.device_free = memory_->free_bytes();
  for (std::size_t tag = 0; tag < tag_count; ++tag) record.holders[tag] = held(static_cast<Tag>(tag));
  throw OutOfMemoryError(record);
}

void Pool::check_invariants() const {
  const Operation operation(*this);
  check_locked();
}

void Pool::verify() const {
  if (always_verify_) check_locked();
}

void Pool::check_locked() const {
  const auto require = [](bool holds, const char* invariant) {
    if (!holds) throw std::logic_error(std::string("pool invariant does not hold: ") + invariant);
  };
  blocks_->check_invariants();
  slabs_->check_invariants();
  std::array<std::size_t, tag_count> large{};
  std::size_t slabs = 0;
  for (const Block& block : blocks_->all_blocks()) {
    if (!block.active) continue;
    if (block.slab != nullptr) {
      ++slabs;
    } else {
      large[static_cast<std::size_t>(block.tag)] += block.bytes();
    }
  }
  require(slabs == slabs_->count(), "every slab is an active block");
  require(large == large_, "the bytes of large blocks are counted by tag");
  require(held(Tag::activations) + held(Tag::weights) == blocks_->active(),
          "the bytes held by the tags add up to active");
  require(requested_ <= blocks_->active(), "requested <= active");
}

}  // namespace glake
