// Weights: memory whose addresses stay while what lies there comes and goes.
//
// Words
//   region   a reservation of addresses, cut into chunks that lie one behind the other
//   chunk    a piece of a region: absent, loading, or resident. Of kind memory: physical memory of its own, which may
//            be mapped in several regions, read-only once it is loaded. Of kind shared: the same, of memory that other
//            processes have too; whoever loads it makes it, or adopts what another has made. Of kind file: a file's
//            pages (host). One that is on the host has memory of the machine, which the device reads over its link
//   user     a model: the chunks that it needs. Busy while it runs or loads; awake from its first use until it is
//            suspended; evictable where the pool may take its memory while it is idle
//
// Rules
//   A chunk becomes absent when nobody awake needs it (suspend), or when room is needed (evict): then first those that
//   no user has, the longest unused first; then those of evictable users that are not busy, lowest priority first and
//   then the least recently used, where a chunk of several users counts as its most important and latest one. Never
//   what a busy user, or an awake one that is not evictable, needs; nor what is on the host, which makes no room: that
//   goes by suspend, and with its last user. A chunk is active while it is not absent and has a user. Bytes of chunks
//   that are not absent are reserved in the budget; those on the host are neither active nor reserved, but offloaded.
//   Memory is unmapped once the device has done all work that was queued when its last user ended. Shared chunks that
//   became absent, but for those of give_up(), are told by take_gone().
//
// Not thread-safe: Pool locks, and waits where begin() says so. Functions that throw have changed nothing, unless
// noted.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <vector>

#include "fences.hpp"
#include "virtual_memory.hpp"

namespace glake {

// What Weights asks of its pool.
class WeightBudget {
 public:
  // Counts bytes as reserved, having given idle memory back if need be; false if there is no room. What is common
  // (other processes may have the same memory) counts against the limit alone, other memory against the quota too.
  [[nodiscard]] virtual bool reserve(std::size_t bytes, bool common) = 0;
  virtual void unreserve(std::size_t bytes, bool common) noexcept = 0;
  // By how much that many bytes (and of them the common ones) would exceed the limit, with all idle memory given back.
  [[nodiscard]] virtual std::size_t excess(std::size_t bytes, std::size_t common) = 0;
  // Whether the quota is nearer than the limit, with so much more common memory: then it is of no use that common
  // memory goes.
  [[nodiscard]] virtual bool quota_binds(std::size_t common) const noexcept = 0;
  // Gives all idle memory back: the device is full.
  virtual void give_back_idle() = 0;
  // Counts bytes as active (and those asked for, by holder), or no longer.
  virtual void activate(std::size_t bytes, std::size_t requested, std::uint32_t holder) = 0;
  virtual void deactivate(std::size_t bytes, std::size_t requested, std::uint32_t holder) noexcept = 0;

 protected:
  ~WeightBudget() = default;
};

class Weights {
 public:
  using Id = std::uint64_t;  // of a region, a chunk or a user; never used again
  using Clock = std::chrono::steady_clock;
  enum class Kind : std::uint8_t { memory, file, shared };

  struct Piece {
    std::size_t bytes = 0;      // kind file: a multiple of a page; else of the granule
    std::size_t requested = 0;  // that weights take of it
    Id shared = 0;              // a chunk of that kind (not file) and size, to be mapped here too
    bool adds = false;          // of a shared one: these weights lie beside those of others, and are not the same
    bool on_host = false;       // kind memory: a multiple of the host's granule too. A shared one is as it was placed
  };
  struct Placement {
    Id region = 0;
    Address address = 0;
    std::vector<Id> chunks;  // one per piece
  };
  struct UserView {  // bytes
    std::size_t bytes = 0;
    std::size_t missing = 0;          // of absent chunks, and of those that are loading
    std::size_t missing_on_host = 0;  // of missing
    std::size_t busy = 0;             // count
    bool awake = false;
    bool evictable = false;
    int priority = 0;
    double idle_seconds = 0;
  };

  Weights(VirtualMemory& memory, Fences& fences, WeightBudget& budget)
      : memory_(memory), fences_(fences), budget_(budget) {}
  Weights(const Weights&) = delete;
  Weights& operator=(const Weights&) = delete;
  ~Weights();

  // Reserves addresses. The new chunks are absent and have no user. Throws DriverError, InvalidPointer (no such chunk).
  [[nodiscard]] Placement place(std::span<const Piece> pieces, Kind kind, std::uint32_t holder);
  // Gives a region back, whose addresses nobody uses any more. Throws InvalidPointer where a chunk that lies nowhere
  // else has a user, DriverError.
  void remove_region(Id region);
  // Maps `by` in the place of a region's chunk that lies nowhere else and has the same bytes: users of that one have
  // `by` from now on, and its memory is given back. Both are resident, of kind memory, equal in size, and not on the
  // host. The device has done whatever was queued that touches the place. Throws InvalidPointer, DriverError.
  void replace(Id region, std::size_t index, Id by);
  // Bytes of the region's chunks that are not absent.
  [[nodiscard]] std::size_t resident_in(Id region) const;

  [[nodiscard]] Id add_user(std::span<const Id> chunks, bool evictable, int priority);
  void remove_user(Id user);
  void set_policy(Id user, bool evictable, int priority);
  [[nodiscard]] UserView view(Id user) const;

  // Begins a use. Nothing: the caller waits until something has changed, and asks again: another user is loading what
  // this one needs, or there is room only once another has ended. Else the user is busy, and the chunks that are named
  // are loading: the caller fills them and says loaded() or failed(). With `later` they have no memory yet, only room:
  // make() gives it, so that the first are filled while the last are mapped. Throws NoRoom if there is no room and none
  // to wait for (nothing was evicted then), DeviceFullError, DriverError.
  struct NoRoom {
    std::size_t bytes = 0;
  };
  [[nodiscard]] std::optional<std::vector<Id>> begin(Id user, bool later = false);
  // They are resident, and read-only but for those of kind memory that are to stay writable: until freeze().
  void loaded(Id user, std::span<const Id> chunks, bool writable = false);
  // They are absent again, and the use has ended; with it the only one, the user is as after suspend().
  void failed(Id user, std::span<const Id> chunks) noexcept;
  void end(Id user);
  // As if a use ended now: the user's chunks go only once the device has done what is queued. Needs no room.
  void touch(Id user);
  // Where a chunk that is loading lies: in its first region.
  [[nodiscard]] Address address(Id chunk) const;
  // Maps a chunk that a busy user has at one more address, for writing what nobody has read yet, until end_writing().
  [[nodiscard]] Address begin_writing(Id chunk);
  void end_writing(Id chunk, Address address);
  // Fills a loading chunk of kind file with the first `bytes` of a file.
  void map_file(Id chunk, int descriptor, std::size_t bytes);
  // Gives a loading chunk of kind shared, one on the host, or one that was to have it later, memory to be written to.
  // (That of the host takes long to page-lock: so others may do something between chunks.) Throws DriverError,
  // DeviceFullError.
  void make(Id chunk);
  // The same of several, faster where they lie one behind the other. After an error some may have it.
  void make(std::span<const Id> chunks);
  void unmake(Id chunk) noexcept;  // takes it back, if it was given
  // Nobody can write to it any more (loaded() does this to all others).
  void freeze(Id chunk);
  // The same of several, faster where they lie one behind the other. After an error some may be so.
  void freeze(std::span<const Id> chunks);
  // Gives a loading chunk of kind shared the frozen memory of a descriptor, which is the chunk's from now on.
  void adopt(Id chunk, int descriptor);
  [[nodiscard]] std::size_t bytes(Id chunk) const;
  // The driver's handle of a chunk that is there, for others to map; it stays the chunk's.
  [[nodiscard]] std::uint64_t handle(Id chunk) const;
  // The descriptor of a shared chunk's memory.
  [[nodiscard]] int descriptor(Id chunk) const;

  // Shared chunks that became absent since the last call, and whether that was to give memory back (suspend,
  // drop_unused) or to make room below the limit.
  struct Gone {
    Id chunk = 0;
    bool drop = false;
  };
  [[nodiscard]] std::vector<Gone> take_gone();
  // A file descriptor (eventfd) that gets 1 added when there begins to be something for take_gone(); it must outlive
  // this.
  void tell_gone(int event) noexcept { gone_event_ = event; }
  [[nodiscard]] int gone_event() const noexcept { return gone_event_; }
  // The shared chunks that may go now.
  struct Offer {
    Id chunk = 0;
    bool awake = false;
    int priority = 0;
    double idle_seconds = 0;
  };
  [[nodiscard]] std::vector<Offer> offers() const;
  // Bytes of shared chunks that busy users have.
  [[nodiscard]] std::size_t shared_busy() const noexcept;
  // How many uses go on that do not wait for chunks to be loaded.
  [[nodiscard]] std::size_t running() const noexcept;
  // Makes those of these chunks absent that may go; returns them.
  std::vector<Id> give_up(std::span<const Id> chunks) noexcept;

  // The user is not busy (asked by the caller). What no awake user needs becomes absent; returns the bytes.
  std::size_t suspend(Id user);
  // Makes chunks absent, until `bytes` are gone or nothing is left that may go; returns the bytes. Common ones are of
  // use only against the limit: not where the quota binds or the device is full, as another process may keep their
  // memory.
  enum class Which : std::uint8_t { all, own };
  std::size_t evict(std::size_t bytes, Which which) noexcept;
  // The bytes that evict() could make absent.
  [[nodiscard]] std::size_t evictable(Which which) const noexcept;
  // Makes what has no user and is on the host absent: nobody ever needs its room, so it is not kept for later.
  void drop_unused_on_host() noexcept;
  // Makes what has no user absent, until `bytes` are gone; returns the bytes.
  std::size_t drop_unused(std::size_t bytes, Which which = Which::all) noexcept;

  // Bytes of the device that those of these chunks take which are absent, and that evict() could make absent besides
  // these chunks.
  struct Need {
    std::size_t missing = 0;
    std::size_t evictable = 0;
  };
  [[nodiscard]] Need need(std::span<const Id> chunks) const;

  [[nodiscard]] bool busy(Id user) const;
  // Whether a use of it takes, or keeps, memory that another could have.
  [[nodiscard]] bool matters(Id user) const;
  [[nodiscard]] std::size_t reserved() const noexcept { return reserved_; }
  [[nodiscard]] std::size_t active() const noexcept { return active_; }
  [[nodiscard]] std::size_t files() const noexcept { return files_; }    // of active
  [[nodiscard]] std::size_t common() const noexcept { return common_; }  // of reserved: kinds shared and file
  [[nodiscard]] std::size_t requested() const noexcept { return requested_; }
  [[nodiscard]] std::size_t offloaded() const noexcept { return offloaded_; }

  void check_invariants() const;

 private:
  enum class State : std::uint8_t { absent, loading, resident };
  struct User;
  struct Chunk {
    Id id = 0;
    Kind kind = Kind::memory;
    State state = State::absent;
    std::size_t bytes = 0;
    std::size_t requested = 0;
    std::uint32_t holder = 0;
    bool frozen = false;
    bool on_host = false;
    std::vector<Address> places;
    std::optional<PhysicalMemory> physical;
    [[nodiscard]] bool shared() const noexcept { return kind == Kind::shared; }
    // Whether its memory may be that of other processes too: a broker's, or a file's pages, which the system has once.
    [[nodiscard]] bool common() const noexcept { return kind != Kind::memory; }
    // Whether something is mapped at its places. (What is made later has nothing at first.)
    [[nodiscard]] bool mapped() const noexcept { return kind == Kind::file ? state != State::absent : !!physical; }
    std::vector<User*> users;
    Fence fence = 0;  // of users that are gone
    Clock::time_point last_use;
  };
  struct User {
    std::vector<Chunk*> chunks;
    std::size_t missing = 0;  // count of chunks that are not resident
    std::size_t busy = 0;
    bool awake = false;
    bool evictable = false;
    int priority = 0;
    Fence fence = 0;
    Clock::time_point last_use;
  };
  struct Region {
    AddressRange range;
    std::vector<Id> chunks;
    std::vector<Piece> pieces;  // as they were asked for
  };

  template <class Map>
  [[nodiscard]] static auto& find(Map& map, Id id);  // throws InvalidPointer
  void take_out(Region& region, std::size_t count);
  void make_present(Chunk& chunk, bool later);
  [[nodiscard]] PhysicalMemory create(const Chunk& chunk);
  // How many of these chunks, from the first one on, have memory of their own and lie at one address each, one behind
  // the other.
  [[nodiscard]] std::size_t run_of(std::span<const Id> chunks) const;
  void make_absent(Chunk& chunk, bool drop = false) noexcept;
  [[nodiscard]] Chunk& loading(Id chunk, Kind kind);
  void take(Chunk& chunk, PhysicalMemory physical, Access access);
  void clear(Chunk& chunk) noexcept;
  [[nodiscard]] bool settle(const Chunk& chunk, bool may_throw) const;
  [[nodiscard]] std::size_t requested_of(const Chunk& chunk) const noexcept;
  void request(Chunk& chunk, std::size_t bytes);
  [[nodiscard]] static bool may_go(const Chunk& chunk) noexcept;
  void activate(Chunk& chunk);
  void deactivate(Chunk& chunk) noexcept;
  [[nodiscard]] bool someone_else_is_busy(const User& user) const noexcept;
  [[nodiscard]] static Offer rank(const Chunk& chunk, Clock::time_point now) noexcept;
  template <class Eligible>
  std::size_t drop(std::size_t bytes, bool for_good, const Eligible& eligible) noexcept;

  VirtualMemory& memory_;
  Fences& fences_;
  WeightBudget& budget_;
  Id last_ = 0;
  std::map<Id, Chunk> chunks_;
  std::map<Id, User> users_;
  std::map<Id, Region> regions_;
  std::map<Address, AddressRange> writable_;
  std::vector<Gone> gone_;  // has room for every shared chunk, twice
  int gone_event_ = -1;
  std::size_t reserved_ = 0;
  std::size_t active_ = 0;
  std::size_t files_ = 0;
  std::size_t common_ = 0;
  std::size_t requested_ = 0;
  std::size_t offloaded_ = 0;
};

}  // namespace glake
