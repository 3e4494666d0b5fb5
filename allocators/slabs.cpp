#include "slabs.hpp"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>

namespace glake {
namespace {

std::size_t round_up(std::size_t bytes, std::size_t step) { return (bytes + step - 1) / step * step; }

}  // namespace

std::size_t Slabs::smallest_slab(std::size_t bytes) const noexcept {
  return round_up(size_classes::bytes(size_classes::index(bytes)), blocks_.granule());
}

Address Slabs::allocate(std::size_t bytes, Tag tag) {
  const std::size_t class_index = size_classes::index(bytes);
  Class& own = classes_[static_cast<std::size_t>(tag)][class_index];
  Slab* slab = own.partial.front();
  if (slab == nullptr) slab = make(class_index, tag);
  if (slab == nullptr) return 0;

  std::size_t word = 0;
  while (slab->free[word] == 0) ++word;
  const auto bit = static_cast<std::size_t>(std::countr_zero(slab->free[word]));
  slab->free[word] &= slab->free[word] - 1;
  const std::size_t object = word * 64 + bit;
  slab->requested[object] = static_cast<std::uint32_t>(bytes);
  ++own.live;
  if (++slab->live == slab->capacity) own.partial.remove(*slab);
  return slab->block->address() + object * slab->object_bytes;
}

Slab* Slabs::make(std::size_t class_index, Tag tag) {
  const std::size_t object_bytes = size_classes::bytes(class_index);
  Class& own = classes_[static_cast<std::size_t>(tag)][class_index];
  const std::size_t wanted = std::clamp<std::size_t>(own.live, 1, size_classes::objects_per_slab(object_bytes));
  // What can fail for want of ordinary memory comes before a block is taken.
  auto slab = std::make_unique<Slab>();
  const std::size_t granule = blocks_.granule();
  const std::size_t block_bytes = round_up(wanted * object_bytes, granule);

  Block* block = blocks_.acquire(block_bytes);
  if (block == nullptr) block = blocks_.acquire(round_up(object_bytes, granule));
  if (block == nullptr) return nullptr;

  Slab* const made = slab.get();
  try {
    made->block = block;
    made->class_index = class_index;
    made->object_bytes = object_bytes;
    made->capacity = block->bytes() / object_bytes;
    made->free.assign((made->capacity + 63) / 64, ~std::uint64_t{0});
    if (made->capacity % 64 != 0) made->free.back() = (std::uint64_t{1} << (made->capacity % 64)) - 1;
    made->requested.assign(made->capacity, 0);
    slabs_.emplace(block, std::move(slab));
    const std::size_t first = block->address() / granule;
    for (std::size_t part = 0; part < block->bytes() / granule; ++part) by_granule_.emplace(first + part, made);
  } catch (...) {
    const std::size_t first = block->address() / granule;
    for (std::size_t part = 0; part < block->bytes() / granule; ++part) by_granule_.erase(first + part);
    slabs_.erase(block);
    blocks_.release(*block);
    throw;
  }
  block->slab = made;
  block->tag = tag;
  active_[static_cast<std::size_t>(tag)] += block->bytes();
  own.partial.push_back(*made);
  return made;
}

Slab* Slabs::find(Address address) const noexcept {
  const auto found = by_granule_.find(address / blocks_.granule());
  return found == by_granule_.end() ? nullptr : found->second;
}

bool Slabs::is_live(const Slab& slab, Address address) noexcept {
  const std::size_t offset = address - slab.block->address();
  const std::size_t object = offset / slab.object_bytes;
  return offset % slab.object_bytes == 0 && object < slab.capacity &&
         (slab.free[object / 64] >> (object % 64) & 1) == 0;
}

std::size_t Slabs::deallocate(Slab& slab, Address address) noexcept {
  const std::size_t object = (address - slab.block->address()) / slab.object_bytes;
  Class& own = classes_[static_cast<std::size_t>(slab.block->tag)][slab.class_index];
  slab.free[object / 64] |= std::uint64_t{1} << (object % 64);
  const std::size_t requested = slab.requested[object];
  --own.live;
  if (slab.live-- == slab.capacity) own.partial.push_back(slab);
  if (slab.live == 0) {
    own.partial.remove(slab);
    destroy(slab);
  }
  return requested;
}

void Slabs::destroy(Slab& slab) noexcept {
  Block& block = *slab.block;
  const std::size_t first = block.address() / blocks_.granule();
  for (std::size_t part = 0; part < block.bytes() / blocks_.granule(); ++part) by_granule_.erase(first + part);
  active_[static_cast<std::size_t>(block.tag)] -= block.bytes();
  slabs_.erase(&block);
  blocks_.release(block);
}

void Slabs::check_invariants() const {
  const auto require = [](bool holds, const char* invariant) {
    if (!holds) throw std::logic_error(std::string("pool invariant does not hold: ") + invariant);
  };
  std::array<std::size_t, tag_count> active{};
  std::array<std::array<std::size_t, size_classes::count>, tag_count> live{};
  std::size_t granules = 0;
  for (const auto& [block, slab] : slabs_) {
    const auto tag = static_cast<std::size_t>(block->tag);
    require(block->active && block->slab == slab.get(), "every slab is an active block");
    std::size_t free = 0;
    for (const std::uint64_t word : slab->free) free += static_cast<std::size_t>(std::popcount(word));
    require(free + slab->live == slab->capacity, "a slab's objects are live or free");
    require(slab->live != 0, "a slab has a live object");
    require(classes_[tag][slab->class_index].partial.contains(*slab) == (free != 0),
            "partial lists hold exactly the slabs with a free object");
    require(find(block->address() + block->bytes() - 1) == slab.get(), "every slab is found by its addresses");
    active[tag] += block->bytes();
    live[tag][slab->class_index] += slab->live;
    granules += block->bytes() / blocks_.granule();
  }
  require(active == active_, "the bytes of slabs are counted by tag");
  require(granules == by_granule_.size(), "only slabs are found by their granules");
  for (std::size_t tag = 0; tag < tag_count; ++tag) {
    for (std::size_t index = 0; index < size_classes::count; ++index) {
      require(live[tag][index] == classes_[tag][index].live, "live objects are counted by class");
    }
  }
}

}  // namespace glake
