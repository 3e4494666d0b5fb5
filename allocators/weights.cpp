#include "weights.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <string>
#include <tuple>
#include <utility>

#include "arithmetic.hpp"
#include "invariants.hpp"
#include "pool.hpp"

namespace glake {
namespace {
constexpr std::size_t page = 4096;
}  // namespace

template <class Map>
auto& Weights::find(Map& map, Id id) {
  const auto found = map.find(id);
  if (found == map.end()) {
    throw InvalidPointer("number " + std::to_string(id) + " is none of this pool's weights, or was removed already");
  }
  return found->second;
}

Weights::~Weights() {
  for (auto& [id, chunk] : chunks_) clear(chunk);
}

Weights::Placement Weights::place(std::span<const Piece> pieces, Kind kind, std::uint32_t holder) {
  std::size_t total = 0;
  for (const Piece& piece : pieces) {
    total = plus(total, piece.bytes);
    if (piece.on_host && kind != Kind::memory) {
      throw InvalidPointer("a chunk on the host has memory of its own: its kind is memory");
    }
    if (piece.shared == 0) continue;
    const Chunk& chunk = find(chunks_, piece.shared);
    if (chunk.kind != kind || kind == Kind::file || chunk.bytes != piece.bytes) {
      throw InvalidPointer("chunk " + std::to_string(piece.shared) + " cannot be mapped a second time here: it has " +
                           std::to_string(chunk.bytes) + " bytes");
    }
  }
  Placement placement;
  placement.chunks.reserve(pieces.size());
  const Id number = placement.region = ++last_;
  // A rest of a granule would be one more mapping beside each file's.
  std::size_t step = kind == Kind::file ? page : memory_.granularity();
  if (std::any_of(pieces.begin(), pieces.end(), [](const Piece& piece) { return piece.on_host; })) {
    step = std::max(step, memory_.granularity_on_host());
  }
  Region& region = regions_.emplace(number, Region{AddressRange(memory_, round_up(total, step)), {}, {}}).first->second;
  Address address = placement.address = region.range.address();
  try {
    for (const Piece& piece : pieces) {
      const Id id = piece.shared != 0 ? piece.shared : ++last_;
      region.chunks.push_back(id);
      region.pieces.push_back(piece);
      Chunk& chunk = chunks_[id];
      if (piece.shared == 0) {
        chunk.id = id;
        chunk.kind = kind;
        chunk.bytes = piece.bytes;
        chunk.requested = piece.requested;
        chunk.holder = holder;
        chunk.on_host = piece.on_host;
        chunk.last_use = Clock::now();
      }
      if (kind == Kind::shared) gone_.reserve(gone_.size() + 2 * chunks_.size());
      chunk.places.reserve(chunk.places.size() + 1);
      if (chunk.mapped()) {
        memory_.map(address, chunk.physical->handle(), chunk.frozen ? Access::read_only : Access::read_write);
      }
      chunk.places.push_back(address);
      placement.chunks.push_back(id);
      if (piece.shared != 0) request(chunk, requested_of(chunk));
      address += piece.bytes;
    }
  } catch (...) {
    take_out(region, placement.chunks.size());
    regions_.erase(number);
    std::erase_if(chunks_, [](const auto& each) { return each.second.places.empty(); });
    throw;
  }
  return placement;
}

// Unmaps the first chunks of a region from it. What lies nowhere else is absent and gone.
void Weights::take_out(Region& region, std::size_t count) {
  Address address = region.range.address();
  for (std::size_t i = 0; i < count; ++i) {
    const auto found = chunks_.find(region.chunks[i]);
    Chunk& chunk = found->second;
    if (chunk.places.size() == 1) {
      make_absent(chunk);
      chunks_.erase(found);
    } else {
      if (chunk.mapped()) memory_.unmap(address, chunk.bytes);
      std::erase(chunk.places, address);
      request(chunk, requested_of(chunk));
    }
    address += region.pieces[i].bytes;
  }
}

void Weights::replace(Id region, std::size_t index, Id by) {
  Region& found = find(regions_, region);
  if (index >= found.chunks.size()) {
    throw InvalidPointer("region " + std::to_string(region) + " has no chunk " + std::to_string(index));
  }
  const Id id = found.chunks[index];
  if (id == by) return;
  Chunk& old = find(chunks_, id);
  Chunk& chunk = find(chunks_, by);
  for (const Chunk* each : {&old, &chunk}) {
    if (each->kind != Kind::memory || each->on_host || each->state != State::resident || each->bytes != chunk.bytes) {
      throw InvalidPointer("chunk " + std::to_string(by) + " cannot take the place of chunk " + std::to_string(id));
    }
  }
  if (old.places.size() != 1 || !chunk.frozen) {
    throw InvalidPointer("chunk " + std::to_string(id) + " lies in other regions too, or chunk " + std::to_string(by) +
                         " can still be written to");
  }
  const Address place = old.places.front();
  chunk.places.reserve(chunk.places.size() + 1);
  chunk.users.reserve(chunk.users.size() + old.users.size());
  memory_.unmap(place, old.bytes);
  try {
    memory_.map(place, chunk.physical->handle(), Access::read_only);
  } catch (...) {
    memory_.map(place, old.physical->handle(), old.frozen ? Access::read_only : Access::read_write);
    throw;
  }
  if (!old.users.empty()) {
    if (chunk.users.empty()) activate(chunk);
    deactivate(old);
  }
  for (User* user : old.users) {
    const auto mine = std::find(user->chunks.begin(), user->chunks.end(), &old);
    if (std::find(user->chunks.begin(), user->chunks.end(), &chunk) != user->chunks.end()) {
      user->chunks.erase(mine);
    } else {
      *mine = &chunk;
      chunk.users.push_back(user);
    }
  }
  chunk.places.push_back(place);
  found.chunks[index] = by;
  reserved_ -= old.bytes;
  budget_.unreserve(old.bytes, false);
  chunks_.erase(id);
  request(chunk, requested_of(chunk));
}

std::size_t Weights::resident_in(Id region) const {
  std::size_t bytes = 0;
  for (const Id id : find(regions_, region).chunks) {
    const Chunk& chunk = find(chunks_, id);
    if (chunk.state != State::absent) bytes += chunk.bytes;
  }
  return bytes;
}

void Weights::remove_region(Id region) {
  Region& found = find(regions_, region);
  for (const Id id : found.chunks) {
    const Chunk& chunk = find(chunks_, id);
    if (chunk.places.size() == 1 && !chunk.users.empty()) {
      throw InvalidPointer("weights of region " + std::to_string(region) + " are still used");
    }
    (void)settle(chunk, true);  // others may have it in their regions too: nothing reads it here any more
  }
  take_out(found, found.chunks.size());
  regions_.erase(region);
}

// What weights take of a chunk: of all regions that have others there, and once of those that have the same.
std::size_t Weights::requested_of(const Chunk& chunk) const noexcept {
  std::size_t same = 0;
  std::size_t added = 0;
  for (const Address place : chunk.places) {
    for (const auto& [id, region] : regions_) {
      const Address start = region.range.address();
      if (place < start || place >= start + region.range.bytes()) continue;
      Address address = start;
      for (const Piece& piece : region.pieces) {
        if (address == place) {
          if (piece.adds) {
            added += piece.requested;
          } else {
            same = std::max(same, piece.requested);
          }
        }
        address += piece.bytes;
      }
    }
  }
  return same + added;
}

void Weights::request(Chunk& chunk, std::size_t bytes) {
  if (chunk.state != State::absent && !chunk.users.empty() && !chunk.on_host) {
    budget_.activate(0, bytes, chunk.holder);
    budget_.deactivate(0, chunk.requested, chunk.holder);
    requested_ += bytes;
    requested_ -= chunk.requested;
  }
  chunk.requested = bytes;
}

Address Weights::begin_writing(Id id) {
  const Chunk& chunk = find(chunks_, id);
  if (!chunk.physical) throw InvalidPointer("chunk " + std::to_string(id) + " is not there to be written to");
  AddressRange range(memory_, chunk.bytes);
  const Address address = range.address();
  const auto [place, inserted] = writable_.emplace(address, std::move(range));
  try {
    memory_.map(address, chunk.physical->handle());
  } catch (...) {
    writable_.erase(place);
    throw;
  }
  return address;
}

void Weights::end_writing(Id id, Address address) {
  const Chunk& chunk = find(chunks_, id);
  if (!writable_.contains(address)) throw InvalidPointer("nothing is written there");
  memory_.unmap(address, chunk.bytes);
  writable_.erase(address);
}

Weights::Id Weights::add_user(std::span<const Id> chunks, bool evictable, int priority) {
  User user;
  for (const Id id : chunks) user.chunks.push_back(&find(chunks_, id));
  std::sort(user.chunks.begin(), user.chunks.end(), [](const Chunk* a, const Chunk* b) { return a->id < b->id; });
  user.chunks.erase(std::unique(user.chunks.begin(), user.chunks.end()), user.chunks.end());
  user.evictable = evictable;
  user.priority = priority;
  user.last_use = Clock::now();
  const Id id = ++last_;
  User& made = users_.emplace(id, std::move(user)).first->second;
  std::size_t done = 0;
  try {
    for (Chunk* chunk : made.chunks) {
      chunk->users.push_back(&made);
      ++done;
      if (chunk->users.size() == 1 && chunk->state != State::absent) activate(*chunk);
      if (chunk->state != State::resident) ++made.missing;
    }
  } catch (...) {
    for (std::size_t i = 0; i < done; ++i) made.chunks[i]->users.pop_back();
    users_.erase(id);
    throw;
  }
  return id;
}

void Weights::remove_user(Id id) {
  User& user = find(users_, id);
  for (Chunk* chunk : user.chunks) {
    std::erase(chunk->users, &user);
    chunk->fence = std::max(chunk->fence, user.fence);
    chunk->last_use = std::max(chunk->last_use, user.last_use);
    if (chunk->users.empty() && chunk->state != State::absent) deactivate(*chunk);
  }
  users_.erase(id);
  drop_unused_on_host();
}

void Weights::set_policy(Id id, bool evictable, int priority) {
  User& user = find(users_, id);
  user.evictable = evictable;
  user.priority = priority;
}

Weights::UserView Weights::view(Id id) const {
  const User& user = find(users_, id);
  UserView view;
  for (const Chunk* chunk : user.chunks) {
    view.bytes += chunk->bytes;
    if (chunk->state == State::resident) continue;
    view.missing += chunk->bytes;
    if (chunk->on_host) view.missing_on_host += chunk->bytes;
  }
  view.busy = user.busy;
  view.awake = user.awake;
  view.evictable = user.evictable;
  view.priority = user.priority;
  view.idle_seconds = user.busy != 0 ? 0.0 : std::chrono::duration<double>(Clock::now() - user.last_use).count();
  return view;
}

Address Weights::address(Id chunk) const { return find(chunks_, chunk).places.front(); }

bool Weights::busy(Id user) const { return find(users_, user).busy != 0; }

bool Weights::matters(Id id) const {
  const User& user = find(users_, id);
  return user.missing != 0 || (user.busy == 0 && user.evictable);
}

bool Weights::someone_else_is_busy(const User& user) const noexcept {
  return std::any_of(users_.begin(), users_.end(),
                     [&](const auto& each) { return &each.second != &user && each.second.busy != 0; });
}

std::optional<std::vector<Weights::Id>> Weights::begin(Id id, bool later) {
  User& user = find(users_, id);
  std::vector<Id> loading;
  if (user.missing != 0) {
    std::vector<Chunk*> absent;
    std::size_t bytes = 0;
    std::size_t common = 0;
    for (Chunk* chunk : user.chunks) {
      if (chunk->state == State::loading) return std::nullopt;
      if (chunk->state != State::absent) continue;
      absent.push_back(chunk);
      if (chunk->on_host) continue;
      bytes = plus(bytes, chunk->bytes);
      if (chunk->common()) common = plus(common, chunk->bytes);
    }
    ++user.busy;  // so that nothing of it is evicted
    const std::size_t excess = budget_.excess(bytes, common);
    const Which which = budget_.quota_binds(common) ? Which::own : Which::all;
    if (excess > evictable(which)) {
      --user.busy;
      if (someone_else_is_busy(user)) return std::nullopt;
      throw NoRoom{bytes};
    }
    if (excess != 0) evict(excess, which);  // at once: each call looks at every chunk
    std::size_t present = 0;
    const auto undo = [&] {
      for (std::size_t i = 0; i < present; ++i) make_absent(*absent[i]);
      --user.busy;
    };
    try {
      loading.reserve(absent.size());
      for (Chunk* chunk : absent) {
        make_present(*chunk, later);
        ++present;
        loading.push_back(chunk->id);
      }
    } catch (const NoRoom&) {
      undo();
      if (someone_else_is_busy(user)) return std::nullopt;
      throw NoRoom{bytes};
    } catch (const DeviceFullError&) {
      undo();
      if (someone_else_is_busy(user)) return std::nullopt;
      throw;
    } catch (...) {
      undo();
      throw;
    }
    --user.busy;
  }
  ++user.busy;
  user.awake = true;
  user.last_use = Clock::now();
  return loading;
}

void Weights::make_present(Chunk& chunk, bool later) {
  if (chunk.on_host) {
    chunk.state = State::loading;
    offloaded_ += chunk.bytes;
    return;
  }
  while (!budget_.reserve(chunk.bytes, chunk.common())) {
    const Which which = budget_.quota_binds(chunk.common() ? chunk.bytes : 0) ? Which::own : Which::all;
    if (evict(chunk.bytes, which) == 0) throw NoRoom{chunk.bytes};
  }
  reserved_ += chunk.bytes;
  if (chunk.common()) common_ += chunk.bytes;
  try {
    if (chunk.kind == Kind::memory && !later) take(chunk, create(chunk), Access::read_write);
    chunk.state = State::loading;
    if (!chunk.users.empty()) activate(chunk);
  } catch (...) {
    chunk.state = State::absent;
    clear(chunk);
    reserved_ -= chunk.bytes;
    if (chunk.common()) common_ -= chunk.bytes;
    budget_.unreserve(chunk.bytes, chunk.common());
    throw;
  }
}

PhysicalMemory Weights::create(const Chunk& chunk) {
  if (chunk.shared()) return PhysicalMemory(memory_, memory_.create_shared(chunk.bytes));
  if (chunk.on_host) return PhysicalMemory(memory_, memory_.create_on_host(chunk.bytes));
  try {
    return PhysicalMemory(memory_, chunk.bytes);
  } catch (const DriverError&) {  // the device, or the system, may have less room than our limit
    budget_.give_back_idle();
    evict(chunk.bytes, Which::own);
    return PhysicalMemory(memory_, chunk.bytes);
  }
}

void Weights::clear(Chunk& chunk) noexcept {
  chunk.frozen = false;
  if (!chunk.mapped()) return;
  for (const Address address : chunk.places) memory_.unmap(address, chunk.bytes);
  chunk.physical.reset();
}

// The device has finished with it.
void Weights::make_absent(Chunk& chunk, bool drop) noexcept {
  if (chunk.state == State::absent) return;
  if (chunk.shared() && chunk.physical) {
    if (gone_.empty() && gone_event_ >= 0) {
      const std::uint64_t one = 1;
      (void)!write(gone_event_, &one, sizeof one);
    }
    gone_.push_back({chunk.id, drop});
  }
  clear(chunk);
  if (!chunk.users.empty()) deactivate(chunk);
  if (chunk.state == State::resident) {
    for (User* user : chunk.users) ++user->missing;
  }
  chunk.state = State::absent;
  if (chunk.on_host) {
    offloaded_ -= chunk.bytes;
    return;
  }
  reserved_ -= chunk.bytes;
  if (chunk.common()) common_ -= chunk.bytes;
  budget_.unreserve(chunk.bytes, chunk.common());
}

void Weights::activate(Chunk& chunk) {
  if (chunk.on_host) return;
  budget_.activate(chunk.bytes, chunk.requested, chunk.holder);
  active_ += chunk.bytes;
  requested_ += chunk.requested;
  if (chunk.kind == Kind::file) files_ += chunk.bytes;
}

void Weights::deactivate(Chunk& chunk) noexcept {
  if (chunk.on_host) return;
  budget_.deactivate(chunk.bytes, chunk.requested, chunk.holder);
  active_ -= chunk.bytes;
  requested_ -= chunk.requested;
  if (chunk.kind == Kind::file) files_ -= chunk.bytes;
}

void Weights::map_file(Id id, int descriptor, std::size_t bytes) {
  const Chunk& chunk = loading(id, Kind::file);
  if (bytes > chunk.bytes) {
    throw InvalidPointer("chunk " + std::to_string(id) + " has " + std::to_string(chunk.bytes) + " bytes, and " +
                         std::to_string(bytes) + " of a file do not fit");
  }
  (void)memory_.map_file(descriptor, bytes, chunk.places.front());
}

Weights::Chunk& Weights::loading(Id id, Kind kind) {
  Chunk& chunk = find(chunks_, id);
  if (chunk.kind != kind || chunk.state != State::loading || chunk.physical) {
    throw InvalidPointer("chunk " + std::to_string(id) + " is not one that can be filled in this way now");
  }
  return chunk;
}

void Weights::take(Chunk& chunk, PhysicalMemory physical, Access access) {
  std::size_t mapped = 0;
  try {
    for (const Address address : chunk.places) {
      memory_.map(address, physical.handle(), access);
      ++mapped;
    }
  } catch (...) {
    for (std::size_t i = 0; i < mapped; ++i) memory_.unmap(chunk.places[i], chunk.bytes);
    throw;
  }
  chunk.physical.emplace(std::move(physical));
}

void Weights::make(Id id) {
  Chunk& chunk = loading(id, find(chunks_, id).kind == Kind::memory ? Kind::memory : Kind::shared);
  try {
    take(chunk, create(chunk), Access::read_write);
  } catch (const DeviceFullError&) {
    budget_.give_back_idle();
    take(chunk, create(chunk), Access::read_write);
  }
}

std::size_t Weights::run_of(std::span<const Id> ids) const {
  Address next = 0;
  for (std::size_t i = 0; i < ids.size(); ++i) {
    const Chunk& chunk = find(chunks_, ids[i]);
    const bool plain = chunk.kind == Kind::memory && !chunk.on_host && !chunk.frozen && chunk.places.size() == 1;
    if (!plain || (i != 0 && chunk.places.front() != next)) return i;
    next = chunk.places.front() + chunk.bytes;
  }
  return ids.size();
}

void Weights::make(std::span<const Id> ids) {
  while (!ids.empty()) {
    const std::size_t count = run_of(ids);
    if (count < 2) {
      make(ids.front());
      ids = ids.subspan(1);
      continue;
    }
    std::vector<Chunk*> chunks;
    std::vector<PhysicalMemory> made;
    std::vector<ChunkHandle> handles;
    for (const Id id : ids.first(count)) {
      chunks.push_back(&loading(id, Kind::memory));
      made.push_back(create(*chunks.back()));
      handles.push_back(made.back().handle());
    }
    memory_.map_all(chunks.front()->places.front(), handles);
    for (std::size_t i = 0; i < count; ++i) chunks[i]->physical.emplace(std::move(made[i]));
    ids = ids.subspan(count);
  }
}

void Weights::unmake(Id id) noexcept {
  const auto found = chunks_.find(id);
  if (found != chunks_.end() && found->second.shared() && found->second.state == State::loading) clear(found->second);
}

void Weights::freeze(Id id) {
  Chunk& chunk = find(chunks_, id);
  if (!chunk.physical) throw InvalidPointer("chunk " + std::to_string(id) + " is not there");
  if (chunk.frozen) return;
  memory_.freeze(chunk.physical->handle(), chunk.places);
  chunk.frozen = true;
}

void Weights::freeze(std::span<const Id> ids) {
  while (!ids.empty()) {
    const std::size_t count = run_of(ids);
    if (count < 2) {
      freeze(ids.front());
      ids = ids.subspan(1);
      continue;
    }
    std::size_t bytes = 0;
    for (const Id id : ids.first(count)) {
      const Chunk& chunk = find(chunks_, id);
      if (!chunk.physical) throw InvalidPointer("chunk " + std::to_string(id) + " is not there");
      bytes += chunk.bytes;
    }
    memory_.protect(find(chunks_, ids.front()).places.front(), bytes, Access::read_only);
    for (const Id id : ids.first(count)) find(chunks_, id).frozen = true;
    ids = ids.subspan(count);
  }
}

void Weights::adopt(Id id, int descriptor) {
  Chunk& chunk = loading(id, Kind::shared);
  const int own = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
  if (own < 0) {
    throw DriverError(std::string("keeping a descriptor of shared memory failed: ") + std::strerror(errno) +
                      ". Raise `ulimit -n` where too many files are open.");
  }
  ChunkHandle handle;
  try {
    handle = memory_.adopt(own, chunk.bytes);
  } catch (...) {
    close(own);
    throw;
  }
  take(chunk, PhysicalMemory(memory_, handle), Access::read_only);
  chunk.frozen = true;
}

std::size_t Weights::bytes(Id chunk) const { return find(chunks_, chunk).bytes; }

std::uint64_t Weights::handle(Id id) const {
  const Chunk& chunk = find(chunks_, id);
  if (!chunk.physical || chunk.state != State::resident) {
    throw InvalidPointer("chunk " + std::to_string(id) + " is not there: it has no handle");
  }
  return chunk.physical->handle().value;
}

int Weights::descriptor(Id id) const {
  const Chunk& chunk = find(chunks_, id);
  if (!chunk.shared() || !chunk.physical) throw InvalidPointer("chunk " + std::to_string(id) + " has no descriptor");
  return chunk.physical->handle().descriptor;
}

std::vector<Weights::Gone> Weights::take_gone() {
  std::vector<Gone> gone;
  gone.reserve(gone_.capacity());  // for those to come
  gone.swap(gone_);
  return gone;
}

void Weights::loaded(Id, std::span<const Id> ids, bool writable) {
  std::vector<Id> done;
  for (const Id id : ids) {
    const Kind kind = find(chunks_, id).kind;
    if (kind != Kind::file && !(writable && kind == Kind::memory)) done.push_back(id);
  }
  freeze(done);
  for (const Id id : ids) {
    Chunk& chunk = find(chunks_, id);
    chunk.state = State::resident;
    for (User* each : chunk.users) --each->missing;
  }
}

void Weights::failed(Id id, std::span<const Id> ids) noexcept {
  const auto user = users_.find(id);
  for (const Id each : ids) {
    const auto chunk = chunks_.find(each);
    if (chunk != chunks_.end() && chunk->second.state == State::loading) make_absent(chunk->second);
  }
  if (user != users_.end() && --user->second.busy == 0) user->second.awake = false;
}

void Weights::end(Id id) {
  touch(id);
  --find(users_, id).busy;
}

void Weights::touch(Id id) {
  User& user = find(users_, id);
  user.fence = fences_.now();
  user.last_use = Clock::now();
}

// Waits until no queued work can touch the chunk.
bool Weights::settle(const Chunk& chunk, bool may_throw) const {
  Fence fence = chunk.fence;
  for (const User* user : chunk.users) fence = std::max(fence, user->fence);
  try {
    fences_.synchronize(fence);
    return true;
  } catch (const DriverError&) {  // a device that is lost: what it holds goes with the process
    if (may_throw) throw;
    return false;
  }
}

std::size_t Weights::suspend(Id id) {
  User& user = find(users_, id);
  const auto needed = [&](const Chunk* chunk) {
    return std::any_of(chunk->users.begin(), chunk->users.end(),
                       [&](const User* each) { return each != &user && each->awake; });
  };
  for (Chunk* chunk : user.chunks) {
    if (chunk->state == State::resident && !needed(chunk)) (void)settle(*chunk, true);
  }
  user.awake = false;
  std::size_t bytes = 0;
  for (Chunk* chunk : user.chunks) {
    if (chunk->state != State::resident || needed(chunk)) continue;
    bytes += chunk->bytes;
    make_absent(*chunk, true);
  }
  return bytes;
}

// How important a chunk is: whether anybody awake has it, with what priority, and when it was used last.
Weights::Offer Weights::rank(const Chunk& chunk, Clock::time_point now) noexcept {
  std::tuple<bool, int, Clock::time_point> most{false, 0, chunk.last_use};
  for (const User* user : chunk.users) {
    if (user->awake) most = std::max(most, {true, user->priority, user->last_use});
  }
  const auto [awake, priority, last_use] = most;
  return {chunk.id, awake, priority, std::chrono::duration<double>(now - last_use).count()};
}

std::vector<Weights::Offer> Weights::offers() const {
  std::vector<Offer> offers;
  const auto now = Clock::now();
  for (const auto& [id, chunk] : chunks_) {
    if (chunk.shared() && chunk.state == State::resident && may_go(chunk)) offers.push_back(rank(chunk, now));
  }
  return offers;
}

std::size_t Weights::shared_busy() const noexcept {
  std::size_t bytes = 0;
  for (const auto& [id, chunk] : chunks_) {
    const bool used = std::any_of(chunk.users.begin(), chunk.users.end(), [](const User* u) { return u->busy != 0; });
    if (chunk.shared() && chunk.physical && used) bytes += chunk.bytes;
  }
  return bytes;
}

std::size_t Weights::running() const noexcept {
  std::size_t uses = 0;
  for (const auto& [id, user] : users_) uses += user.missing == 0 ? user.busy : 0;
  return uses;
}

std::vector<Weights::Id> Weights::give_up(std::span<const Id> ids) noexcept {
  std::vector<Id> done;
  try {
    done.reserve(ids.size());
    for (const Id id : ids) {
      const auto found = chunks_.find(id);
      if (found == chunks_.end()) continue;
      Chunk& chunk = found->second;
      if (!chunk.shared() || chunk.state != State::resident || !may_go(chunk) || !settle(chunk, false)) continue;
      make_absent(chunk);
      std::erase_if(gone_, [id](const Gone& gone) { return gone.chunk == id; });
      done.push_back(id);
    }
  } catch (...) {  // no ordinary memory for the list
  }
  return done;
}

template <class Eligible>
std::size_t Weights::drop(std::size_t bytes, bool for_good, const Eligible& eligible) noexcept {
  std::size_t done = 0;
  try {
    std::vector<std::pair<Offer, Chunk*>> candidates;
    const auto now = Clock::now();
    for (auto& [id, chunk] : chunks_) {
      if (chunk.state == State::resident && !chunk.on_host && eligible(chunk))
        candidates.emplace_back(rank(chunk, now), &chunk);
    }
    std::stable_sort(candidates.begin(), candidates.end(), [](const auto& a, const auto& b) {
      return std::tuple(a.first.awake, a.first.priority, -a.first.idle_seconds) <
             std::tuple(b.first.awake, b.first.priority, -b.first.idle_seconds);
    });
    for (const auto& [rank, chunk] : candidates) {
      if (done >= bytes) break;
      if (!settle(*chunk, false)) continue;
      done += chunk->bytes;
      make_absent(*chunk, for_good);
    }
  } catch (...) {  // no ordinary memory for the list
  }
  return done;
}

bool Weights::may_go(const Chunk& chunk) noexcept {
  return std::all_of(chunk.users.begin(), chunk.users.end(),
                     [](const User* user) { return user->busy == 0 && (!user->awake || user->evictable); });
}

std::size_t Weights::evict(std::size_t bytes, Which which) noexcept {
  return drop(bytes, false,
              [which](const Chunk& chunk) { return may_go(chunk) && (which == Which::all || !chunk.common()); });
}

std::size_t Weights::evictable(Which which) const noexcept {
  std::size_t bytes = 0;
  for (const auto& [id, chunk] : chunks_) {
    if (chunk.on_host || (chunk.common() && which == Which::own)) continue;
    if (chunk.state == State::resident && may_go(chunk)) bytes += chunk.bytes;
  }
  return bytes;
}

Weights::Need Weights::need(std::span<const Id> ids) const {
  Need need;
  need.evictable = evictable(Which::all);
  std::set<Id> seen;
  for (const Id id : ids) {
    const Chunk& chunk = find(chunks_, id);
    if (chunk.on_host || !seen.insert(id).second) continue;
    if (chunk.state == State::absent) {
      need.missing = plus(need.missing, chunk.bytes);
    } else if (chunk.state == State::resident && may_go(chunk)) {
      need.evictable -= chunk.bytes;
    }
  }
  return need;
}

void Weights::drop_unused_on_host() noexcept {
  if (offloaded_ == 0) return;
  for (auto& [id, chunk] : chunks_) {
    if (chunk.on_host && chunk.state == State::resident && chunk.users.empty() && settle(chunk, false)) {
      make_absent(chunk);
    }
  }
}

std::size_t Weights::drop_unused(std::size_t bytes, Which which) noexcept {
  return drop(bytes, true,
              [which](const Chunk& chunk) { return chunk.users.empty() && (which == Which::all || !chunk.common()); });
}

void Weights::check_invariants() const {
  std::size_t reserved = 0;
  std::size_t active = 0;
  std::size_t requested = 0;
  std::size_t common = 0;
  std::size_t offloaded = 0;
  for (const auto& [id, chunk] : chunks_) {
    require(!chunk.places.empty(), "every chunk of weights has an address");
    require(
        chunk.kind == Kind::file || (chunk.state == State::absent) == !chunk.physical || chunk.state == State::loading,
        "a chunk of weights has memory exactly while it is not absent");
    require(!chunk.on_host || chunk.kind == Kind::memory, "a chunk on the host has memory of its own");
    if (chunk.state == State::absent) continue;
    if (chunk.on_host) {
      offloaded += chunk.bytes;
      continue;
    }
    reserved += chunk.bytes;
    if (chunk.common()) common += chunk.bytes;
    if (chunk.users.empty()) continue;
    active += chunk.bytes;
    requested += chunk.requested;
  }
  require(reserved == reserved_ && active == active_ && requested == requested_ && common == common_,
          "bytes of weights are counted");
  require(offloaded == offloaded_, "bytes on the host are counted, and in no budget");
  for (const auto& [id, user] : users_) {
    const auto missing = std::count_if(user.chunks.begin(), user.chunks.end(),
                                       [](const Chunk* chunk) { return chunk->state != State::resident; });
    require(user.missing == static_cast<std::size_t>(missing), "a user knows how many of its chunks are missing");
    require(missing == 0 || user.busy == 0 ||
                std::none_of(user.chunks.begin(), user.chunks.end(),
                             [](const Chunk* chunk) { return chunk->state == State::absent; }),
            "nothing that a busy user needs is absent");
  }
}

}  // namespace glake
