#include "slabs.hpp"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>

#include "arena.hpp"
#include "invariants.hpp"

namespace glake {

Slabs::Place Slabs::allocate(std::size_t bytes, std::uint32_t holder, std::uint64_t born, RangeSource& source,
                             SlabTable& table, Usage& usage) {
  const std::size_t class_index = size_classes::index(bytes);
  Class& own = classes_[class_index];
  Slab* slab = own.partial.front();
  if (slab == nullptr) slab = make(class_index, source, table);
  if (slab == nullptr) return {};

  std::size_t word = 0;
  while (slab->free[word] == 0) ++word;
  const auto bit = static_cast<std::size_t>(std::countr_zero(slab->free[word]));
  const std::size_t object = word * 64 + bit;
  if (!slab->fences.empty()) arena_.order(slab->fences[object]);
  slab->free[word] &= slab->free[word] - 1;
  slab->objects[object] = {static_cast<std::uint32_t>(bytes), holder, born};
  ++own.live;
  if (slab->live++ == 0) {
    --vacant_;
    active_ += slab->range->bytes;
    usage.add(slab->range->bytes);
  }
  if (slab->live == slab->capacity) own.partial.remove(*slab);
  return {slab, object};
}

Slab* Slabs::make(std::size_t class_index, RangeSource& source, SlabTable& table) {
  const std::size_t object_bytes = size_classes::bytes(class_index);
  const std::size_t wanted =
      std::clamp<std::size_t>(classes_[class_index].live, 1, size_classes::objects_per_slab(object_bytes));
  auto slab = std::make_unique<Slab>();
  Heap& heap = arena_.small;
  Range* range = source.acquire(heap, heap.rounded(wanted * object_bytes));
  if (range == nullptr) range = source.acquire(heap, heap.rounded(object_bytes));
  if (range == nullptr) return nullptr;

  Slab* const made = slab.get();
  const auto forget = [&] {
    for (Address step = range->address; step < range->end(); step += heap.step()) table.erase(step);
  };
  try {
    made->range = range;
    made->arena = &arena_;
    made->class_index = class_index;
    made->object_bytes = static_cast<std::uint32_t>(object_bytes);
    made->capacity = static_cast<std::uint32_t>(range->bytes / object_bytes);
    made->free.assign((made->capacity + 63) / 64, ~std::uint64_t{0});
    if (made->capacity % 64 != 0) made->free.back() = (std::uint64_t{1} << (made->capacity % 64)) - 1;
    made->objects.assign(made->capacity, {});
    for (Address step = range->address; step < range->end(); step += heap.step()) table.emplace(step, made);
    slabs_.emplace(range, std::move(slab));
  } catch (...) {
    forget();
    heap.release(*range);
    throw;
  }
  range->slab = made;
  ++vacant_;
  classes_[class_index].partial.push_back(*made);
  return made;
}

void Slabs::deallocate(Slab& slab, std::size_t object, Fence fence, Usage& usage) {
  if (fence != 0) {
    slab.fences.resize(slab.capacity);
    slab.fences[object] = fence;
    slab.fence = fence;
  }
  Class& own = classes_[slab.class_index];
  slab.free[object / 64] |= std::uint64_t{1} << (object % 64);
  --own.live;
  if (slab.live-- == slab.capacity) own.partial.push_back(slab);
  if (slab.live == 0) {
    ++vacant_;
    active_ -= slab.range->bytes;
    usage.active -= slab.range->bytes;
  }
}

void Slabs::flush(SlabTable& table) noexcept {
  if (vacant_ == 0) return;
  for (auto entry = slabs_.begin(); entry != slabs_.end();) {
    Slab& slab = *entry->second;
    if (slab.live != 0) {
      ++entry;
      continue;
    }
    classes_[slab.class_index].partial.remove(slab);
    Range& range = *slab.range;
    range.fence = slab.fence;
    for (Address step = range.address; step < range.end(); step += arena_.small.step()) table.erase(step);
    entry = slabs_.erase(entry);
    arena_.small.release(range);
  }
  vacant_ = 0;
}

void Slabs::check_invariants(const SlabTable& table) const {
  std::array<std::size_t, size_classes::count> live{};
  std::size_t vacant = 0;
  std::size_t active = 0;
  for (const auto& [range, slab] : slabs_) {
    require(range->state == RangeState::live && range->slab == slab.get() && slab->range == range,
            "every slab is a live range");
    std::size_t free = 0;
    for (const std::uint64_t word : slab->free) free += static_cast<std::size_t>(std::popcount(word));
    require(free + slab->live == slab->capacity, "a slab's objects are live or free");
    require(classes_[slab->class_index].partial.contains(*slab) == (free != 0),
            "partial lists hold exactly the slabs with a free object");
    for (Address step = range->address; step < range->end(); step += arena_.small.step()) {
      const auto found = table.find(step);
      require(found != table.end() && found->second == slab.get(), "every slab is found by its addresses");
    }
    live[slab->class_index] += slab->live;
    if (slab->live == 0) ++vacant;
    if (slab->live != 0) active += range->bytes;
  }
  require(vacant == vacant_ && active == active_, "vacant slabs are counted");
  for (std::size_t index = 0; index < size_classes::count; ++index) {
    require(live[index] == classes_[index].live, "live objects are counted by class");
  }
}

}  // namespace glake
