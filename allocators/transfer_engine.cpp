#include "transfer_engine.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "patience.hpp"

#ifndef CLOSE_RANGE_UNSHARE
#define CLOSE_RANGE_UNSHARE (1U << 1)
#endif

namespace glake {

namespace {

constexpr std::size_t MiB = std::size_t{1} << 20;
constexpr std::size_t smallest_piece = MiB;      // of host memory
constexpr std::size_t largest_piece = 16 * MiB;  // a peer's buffers are as large; more is no faster (H200)
constexpr std::size_t largest_alone = 32 * MiB;  // where there is nothing to balance
constexpr std::size_t pieces_per_reader = 8;
constexpr std::size_t slots_per_reader = 2;  // one is filled while another waits for a link
constexpr std::size_t pieces_per_path = 8;   // so that the end of a transfer is short
constexpr std::chrono::microseconds look_again{200};
constexpr std::chrono::microseconds patient{100};  // before a thread sleeps until it is woken up
constexpr unsigned most_spinning = 2;              // readers; the others sleep, and are as many as are not needed
constexpr int tries = 400;                         // of the mutex
constexpr double known_for = 1e-3;                 // seconds that a rate which is known stands for
constexpr double fading = 0.85;                    // weight of what was copied before in the rate of a lane
constexpr double longest_wait = 1e6;               // seconds, so that their sum with the time of day is a time
constexpr std::size_t most_events = std::size_t{1} << 20;

std::int64_t nanoseconds(std::chrono::steady_clock::time_point time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
}

// The process's signals are for its own threads.
void block_signals() noexcept {
  sigset_t all;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, nullptr);
}

// Gives this thread a table of files of its own, which is empty: threads that open and close thousands of small files
// would wait for each other, and nothing that the process closes stays open here. An old kernel refuses, without harm.
void own_files() noexcept {
#ifdef SYS_close_range
  (void)syscall(SYS_close_range, 3U, ~0U, CLOSE_RANGE_UNSHARE);
#endif
}

DriverError no_threads() {
  return DriverError(
      "starting a thread for transfers failed: the system has no more (pthread_create). See `ulimit -u`, and what the "
      "container may have.");
}

}  // namespace

class TransferEngine::Transfer {
 public:
  std::uint64_t number = 0;
  Target target = 0;
  Direction direction = Direction::to_device;
  Settings settings;
  bool of_files = false;
  std::vector<std::string> files;
  std::vector<FilePart> parts;
  std::vector<Piece> pieces;
  std::size_t next = 0;           // piece that nobody has taken yet
  std::deque<std::size_t> ready;  // pieces in memory that no lane has taken yet, or that a lane has lost
  std::size_t reading = 0;        // pieces
  std::size_t flying = 0;
  std::size_t left = 0;  // bytes that no lane has taken
  std::size_t bytes = 0;
  std::size_t done = 0;
  bool stopping = false;
  bool ended = false;
  bool cancelled = false;
  std::optional<ReadError> read_error;
  std::string link_error;
  std::vector<std::string> lost_links;

  // Whether a piece is in memory that no lane has taken.
  [[nodiscard]] bool to_copy() const { return !ready.empty() || (!of_files && next < pieces.size()); }
  [[nodiscard]] bool to_read() const { return of_files && !stopping && next < pieces.size(); }
};

TransferEngine::TransferEngine(std::shared_ptr<HostBuffers> buffers, Options options)
    : buffers_(std::move(buffers)), options_(options) {}

TransferEngine::~TransferEngine() {
  {
    Lock lock = locked();
    for (const Handle& transfer : std::vector<Handle>(active_)) {
      transfer->cancelled = true;
      stop(*transfer);
    }
    to_waiters_.wait(lock, [&] { return active_.empty(); });
    ending_ = true;
    to_readers_.notify_all();
    wake_lanes();
  }
  for (std::thread& reader : readers_) reader.join();
  for (const auto& path : paths_) {
    for (Lane& lane : path->lanes) {
      if (lane.thread.joinable()) lane.thread.join();
    }
  }
  for (const HostBuffer& slab : slabs_) buffers_->give(slab);
}

void TransferEngine::refuse_child() const {
  if (process_.is_child()) throw ForkedProcess();
}

std::vector<TransferEngine::Path*> TransferEngine::paths_of(Target target) const {
  std::vector<Path*> found;
  for (const auto& path : paths_) {
    if (path->target == target && !path->leaving) found.push_back(path.get());
  }
  return found;
}

void TransferEngine::add_path(Target target, std::unique_ptr<CopyLink> link, std::array<double, direction_count> rate) {
  refuse_child();
  const Lock lock = locked();
  auto path = std::make_unique<Path>();
  path->target = target;
  path->number = path_numbers_++;
  path->rank = static_cast<unsigned>(paths_of(target).size());
  path->link = std::move(link);
  for (std::size_t i = 0; i < direction_count; ++i) {
    path->lanes[i].path = path.get();
    path->lanes[i].direction = static_cast<Direction>(i);
    const double known = std::isfinite(rate[i]) ? std::max(0.0, rate[i]) : 0;
    path->lanes[i].rate = known;
    path->lanes[i].recent_bytes = known * known_for;
    path->lanes[i].recent_seconds = known > 0 ? known_for : 0;
  }
  paths_.push_back(std::move(path));
}

void TransferEngine::remove_further_paths(Target target) {
  refuse_child();
  std::vector<std::unique_ptr<Path>> removed;
  {
    Lock lock = locked();
    for (Path* path : paths_of(target)) path->leaving = path->rank > 0;
    for (const Handle& transfer : std::vector<Handle>(active_)) {  // those whose first link has failed
      if (transfer->target != target || transfer->settings.in_place || can_copy(*transfer)) continue;
      transfer->link_error =
          "the path of device " + std::to_string(target) + " failed, and the others were taken away.";
      stop(*transfer);
    }
    wake_lanes();
    const auto is_leaving = [&](const auto& path) { return path->target == target && path->leaving; };
    to_waiters_.wait(lock, [&] {
      return std::all_of(paths_.begin(), paths_.end(), [&](const auto& path) {
        return !is_leaving(path) || (path->lanes[0].flying == 0 && path->lanes[1].flying == 0);
      });
    });
    for (auto& path : paths_) {
      if (is_leaving(path)) removed.push_back(std::move(path));
    }
    std::erase(paths_, nullptr);
  }
  for (const auto& path : removed) {
    for (Lane& lane : path->lanes) {
      if (lane.thread.joinable()) lane.thread.join();
    }
  }
}

std::vector<TransferEngine::PathView> TransferEngine::paths(Target target) const {
  refuse_child();
  const Lock lock = locked();
  std::vector<PathView> views;
  for (const Path* path : paths_of(target)) {
    PathView view;
    view.name = path->link->name();
    view.number = path->number;
    for (std::size_t i = 0; i < direction_count; ++i) {
      view.rate[i] = path->lanes[i].rate;
      view.bytes[i] = path->lanes[i].bytes;
      view.failed = view.failed || path->lanes[i].failed;
    }
    views.push_back(std::move(view));
  }
  return views;
}

void TransferEngine::set_options(Options options) {
  trim();
  const Lock lock = locked();
  options.slot = options_.slot;  // there are such slots
  options_ = options;
  to_readers_.notify_all();
}

// Transfers.

TransferEngine::Handle TransferEngine::load(Target target, std::vector<std::string> files, std::vector<FilePart> parts,
                                            Settings settings) {
  refuse_child();
  std::stable_sort(parts.begin(), parts.end(),
                   [](const FilePart& a, const FilePart& b) { return a.address < b.address; });
  Options options;
  std::size_t slot = 0;
  {
    const Lock lock = locked();
    options = options_;
    slot = std::min(options.slot, most_of(target, settings));
  }
  auto made = std::make_shared<Transfer>();
  made->target = target;
  made->settings = settings;
  made->of_files = true;
  made->files = std::move(files);
  made->parts.reserve(parts.size());
  std::size_t total = 0;
  for (const FilePart& part : parts) total += part.bytes;
  // Enough pieces for all readers, and then some.
  const std::size_t share =
      total / (std::size_t{options.readers} * pieces_per_reader) / PieceReader::block * PieceReader::block;
  const std::size_t most = std::clamp(share, std::min(slot, MiB / 4), slot);
  for (const FilePart& whole : parts) {
    if (whole.file >= made->files.size()) throw std::invalid_argument("a part of a file that is not named");
    for (std::size_t begin = 0; begin < whole.bytes;) {
      Piece* last = made->pieces.empty() ? nullptr : &made->pieces.back();
      const Address address = whole.address + begin;
      const Address end = last != nullptr ? last->address + last->bytes : 0;
      const bool near = last != nullptr && address >= end && address - end <= (settings.in_place ? 0 : options.gap);
      std::size_t bytes = std::min(most, whole.bytes - begin);
      if (!near || address + bytes - last->address > most) {
        made->pieces.push_back({address, 0, nullptr, made->parts.size(), 0, nullptr});
        last = &made->pieces.back();
      }
      made->parts.push_back({whole.file, whole.offset + begin, bytes, address});
      ++last->count;
      last->bytes = address + bytes - last->address;
      begin += bytes;
    }
  }
  for (const Piece& piece : made->pieces) made->bytes += piece.bytes;
  begin(made);
  return made;
}

TransferEngine::Handle TransferEngine::copy(Target target, Direction direction, const std::vector<Span>& spans,
                                            Settings settings) {
  refuse_child();
  auto made = std::make_shared<Transfer>();
  made->target = target;
  made->direction = direction;
  made->settings = settings;
  for (const Span& span : spans) made->bytes += span.bytes;
  std::size_t most = settings.piece;
  if (most == 0) {
    const std::size_t share = made->bytes / (pieces_per_path * std::max(1U, settings.paths));
    const std::size_t largest = settings.paths > 1 ? largest_piece : largest_alone;
    most = std::clamp(share / (MiB / 4) * (MiB / 4), smallest_piece, largest);
  }
  {
    const Lock lock = locked();
    most = std::min(most, most_of(target, settings));
  }
  for (const Span& span : spans) {
    for (std::size_t begin = 0; begin < span.bytes; begin += most) {
      made->pieces.push_back(
          {span.device + begin, std::min(most, span.bytes - begin), span.host + begin, 0, 0, nullptr});
    }
  }
  begin(made);
  return made;
}

std::size_t TransferEngine::most_of(Target target, const Settings& settings) const {
  std::size_t most = SIZE_MAX;
  for (const Path* path : paths_of(target)) {
    if (path->rank < settings.paths && !settings.in_place) most = std::min(most, path->link->most());
  }
  return std::max<std::size_t>(1, most);
}

void TransferEngine::begin(const Handle& transfer) {
  std::unique_lock<std::mutex> one(making_, std::defer_lock);
  if (transfer->of_files && !transfer->settings.in_place) {
    one.lock();  // until the transfer is known: trim() must not take its slots before
    make_slots(transfer->pieces.size());
  }
  const Lock lock = locked();
  Transfer& made = *transfer;
  made.number = ++last_;
  made.left = made.bytes;
  const std::vector<Path*> paths = paths_of(made.target);
  if (made.pieces.empty()) {
    made.ended = true;
    return;
  }
  if (!made.settings.in_place) {
    if (made.settings.paths == 0) throw std::invalid_argument("a transfer takes one path at least");
    if (paths.empty()) throw std::invalid_argument("there is no path to device " + std::to_string(made.target));
    start_lanes(made);
    revive(made);
  }
  if (made.of_files) start_readers(made.pieces.size());
  const auto after = [&](const Handle& other) { return other->settings.priority < made.settings.priority; };
  active_.insert(std::find_if(active_.begin(), active_.end(), after), transfer);
  to_readers_.notify_all();
  wake_lanes();
}

// Where the system has no more threads, with those that are there.
void TransferEngine::start_lanes(const Transfer& made) {
  bool any = false;
  for (Path* path : paths_of(made.target)) {
    Lane& lane = path->lanes[static_cast<std::size_t>(made.direction)];
    if (path->rank >= made.settings.paths) continue;
    try {
      if (!lane.thread.joinable()) lane.thread = std::thread([this, &lane] { run_lane(lane); });
      any = true;
    } catch (const std::system_error&) {
      continue;
    }
  }
  if (!any) throw no_threads();
}

void TransferEngine::start_readers(std::size_t pieces) {
  const std::size_t wanted = std::min<std::size_t>(std::max(1U, options_.readers), pieces);
  while (readers_.size() < wanted) {
    const std::size_t number = readers_.size();
    try {
      readers_.emplace_back([this, number] { read_pieces(number); });
    } catch (const std::system_error&) {
      if (readers_.empty()) throw no_threads();
      return;
    }
  }
}

// Links that failed are tried again once their device has no transfers, and where a new one has no other link.
void TransferEngine::revive(const Transfer& made) {
  const bool alone =
      std::none_of(active_.begin(), active_.end(), [&](const Handle& each) { return each->target == made.target; });
  if (!alone && can_copy(made)) return;
  for (Path* path : paths_of(made.target)) {
    if (alone) {
      for (Lane& lane : path->lanes) lane.failed = false;
    } else if (path->rank < made.settings.paths) {
      path->lanes[static_cast<std::size_t>(made.direction)].failed = false;
    }
  }
}

bool TransferEngine::wait(const Handle& transfer, double seconds) {
  refuse_child();
  const std::chrono::duration<double> most(seconds > 0 ? std::min(seconds, longest_wait) : 0.0);
  Lock lock = locked();
  return to_waiters_.wait_for(lock, most, [&] { return transfer->ended; });
}

void TransferEngine::cancel(const Handle& transfer) {
  refuse_child();
  const Lock lock = locked();
  if (transfer->ended) return;
  transfer->cancelled = true;
  stop(*transfer);
}

TransferEngine::View TransferEngine::view(const Handle& transfer) const {
  refuse_child();
  const Lock lock = locked();
  View view;
  view.bytes = transfer->bytes;
  view.done = transfer->done;
  view.ended = transfer->ended;
  view.cancelled = transfer->cancelled;
  view.read_error = transfer->read_error;
  if (view.read_error) view.file = transfer->files[view.read_error->file];
  view.link_error = transfer->link_error;
  view.lost_links = transfer->lost_links;
  return view;
}

std::uint64_t TransferEngine::number(const Handle& transfer) const { return transfer->number; }

// Nothing more of it is begun; it has ended once what is under way has.
void TransferEngine::stop(Transfer& transfer) {
  transfer.stopping = true;
  for (const std::size_t piece : transfer.ready) {
    if (std::byte* slot = std::exchange(transfer.pieces[piece].slot, nullptr)) give(slot);
  }
  transfer.ready.clear();
  end_if_done(transfer);
}

void TransferEngine::end_if_done(Transfer& transfer) {
  if (transfer.ended || transfer.reading != 0 || transfer.flying != 0) return;
  if (!transfer.stopping && (transfer.next < transfer.pieces.size() || !transfer.ready.empty())) return;
  transfer.ended = true;
  std::erase_if(active_, [&](const Handle& each) { return each.get() == &transfer; });
  to_waiters_.notify_all();
}

TransferEngine::Lock TransferEngine::locked() const {
  Lock lock(mutex_, std::defer_lock);
  relock(lock);
  return lock;
}

void TransferEngine::relock(Lock& lock) {
  for (int i = 0; i < tries; ++i) {
    if (lock.try_lock()) return;
    pause_processor();
  }
  lock.lock();
}

template <class Found>
bool TransferEngine::spin(Lock& lock, const Found& found) {
  for (Patience patience; !patience.is_over(patient);) {
    if (found()) return true;
    const std::uint64_t before = changes_.load(std::memory_order_acquire);
    lock.unlock();
    while (changes_.load(std::memory_order_acquire) == before && !patience.is_over(patient)) patience.wait();
    relock(lock);
  }
  return found();
}

// Slots.

std::size_t TransferEngine::most_slots() const {
  // More would only be page-locked for nothing.
  std::size_t wanted = std::max(1U, options_.readers) * slots_per_reader;
  wanted += paths_.size() * (CopyLink::depth + 1);
  return std::max<std::size_t>(1, std::min(wanted, options_.in_flight / options_.slot));
}

// On the caller's thread: the readers have no files open, and so not the driver's. With making_ locked.
void TransferEngine::make_slots(std::size_t pieces) {
  std::size_t missing = 0;
  std::size_t room = 0;
  std::vector<HostBuffer> spare;  // of a time when there could be more
  {
    const Lock lock = locked();
    if (slots_ > most_slots()) spare = take_slabs();
    const std::size_t wanted = std::min(most_slots(), pieces);
    missing = wanted > slots_ ? wanted - slots_ : 0;
    room = options_.slot + PieceReader::slack;
  }
  for (const HostBuffer& slab : spare) buffers_->give(slab);
  if (missing == 0) return;
  HostBuffer slab;
  try {
    slab = buffers_->take(missing * room);
  } catch (const DriverError&) {
    const Lock lock = locked();
    if (slots_ == 0) throw;
    return;  // with those that are there
  }
  const Lock lock = locked();
  slabs_.push_back(slab);
  for (std::size_t i = 0; i < missing; ++i) free_.push_back(slab.data + i * room);
  slots_ += missing;
}

void TransferEngine::prepare() {
  refuse_child();
  const std::lock_guard one(making_);
  make_slots(SIZE_MAX);
}

void TransferEngine::give(std::byte* slot) {
  free_.push_back(slot);
  changes_.fetch_add(1, std::memory_order_release);
  if (spinning_ == 0) to_readers_.notify_one();
}

TransferEngine::Memory TransferEngine::memory() const {
  refuse_child();
  const Lock lock = locked();
  const bool locked = std::all_of(slabs_.begin(), slabs_.end(), [](const HostBuffer& slab) { return slab.locked; });
  return {slots_ * options_.slot, slots_in_use() * options_.slot, peak_ * options_.slot, locked};
}

void TransferEngine::trim() {
  refuse_child();
  const Lock one(making_);
  std::vector<HostBuffer> slabs;
  {
    const Lock lock = locked();
    slabs = take_slabs();
  }
  for (const HostBuffer& slab : slabs) buffers_->give(slab);
}

// All of them, where no transfer needs any.
std::vector<HostBuffer> TransferEngine::take_slabs() {
  const auto needs = [](const Handle& each) { return each->of_files && !each->settings.in_place; };
  if (slots_in_use() != 0 || std::any_of(active_.begin(), active_.end(), needs)) return {};
  free_.clear();
  slots_ = 0;
  return std::exchange(slabs_, {});
}

// Readers.

TransferEngine::Handle TransferEngine::to_read() {
  for (const Handle& transfer : active_) {
    if (transfer->to_read() && has_share(*transfer)) return transfer;
  }
  return nullptr;
}

bool TransferEngine::has_share(const Transfer& transfer) const {
  if (transfer.settings.in_place) return true;
  std::vector<Target> devices{transfer.target};  // that wait for slots
  std::size_t held = 0;
  for (const Handle& each : active_) {
    if (!each->of_files || each->settings.in_place) continue;
    if (each->target == transfer.target) {
      held += each->reading + each->ready.size() + each->flying;
    } else if (each->to_read() && std::find(devices.begin(), devices.end(), each->target) == devices.end()) {
      devices.push_back(each->target);
    }
  }
  return devices.size() == 1 || held < std::max<std::size_t>(1, most_slots() / devices.size());
}

void TransferEngine::read_pieces(std::size_t number) {
  block_signals();
  Patience::sharpen_naps();
  own_files();
  PieceReader reader;
  Lock lock = locked();
  for (;;) {
    const Handle transfer = to_read();
    if (!transfer) {
      lock.unlock();
      reader.forget();
      relock(lock);
      if (ending_) return;
      to_readers_.wait(lock, [&] { return ending_ || to_read(); });
      continue;
    }
    std::byte* slot = nullptr;
    if (!transfer->settings.in_place) {
      if (!has_slot()) {
        bool found = false;
        if (spinning_ < most_spinning) {
          ++spinning_;
          found = spin(lock, [&] { return has_slot() || ending_; });
          --spinning_;
        }
        if (!found) to_readers_.wait(lock);
        continue;
      }
      slot = free_.back();
      free_.pop_back();
      peak_ = std::max(peak_, slots_in_use());
    }
    const std::size_t index = transfer->next++;
    Piece& piece = transfer->pieces[index];
    ++transfer->reading;
    lock.unlock();
    const std::span<const FilePart> parts(transfer->parts.data() + piece.first, piece.count);
    std::optional<ReadError> error;
    std::byte* host = nullptr;
    const Clock::time_point start = Clock::now();
    try {
      if (slot != nullptr) {
        host = reader.read(transfer->number, transfer->files, parts, slot, transfer->settings.around_cache);
      } else {
        reader.read_in_place(transfer->number, transfer->files, parts);
      }
    } catch (const ReadError& caught) {
      error = caught;
    }
    const Clock::time_point end = Clock::now();
    relock(lock);
    --transfer->reading;
    if (recording_ && events_.size() < most_events) {
      events_.push_back(
          {true, number, transfer->target, transfer->number, nanoseconds(start), nanoseconds(end), piece.bytes});
    }
    if (error || transfer->stopping) {
      if (slot != nullptr) give(slot);
      if (error && !transfer->read_error) transfer->read_error = error;
      stop(*transfer);
    } else if (slot != nullptr) {
      piece.host = host;
      piece.slot = slot;
      transfer->ready.push_back(index);
      changes_.fetch_add(1, std::memory_order_release);
      wake_lanes(transfer.get());
    } else {
      transfer->left -= piece.bytes;
      transfer->done += piece.bytes;
      end_if_done(*transfer);
    }
  }
}

// Lanes.

// A path may be added while transfers go on: it works from the next one on, that starts its thread.
bool TransferEngine::is_usable(const Lane& lane) {
  return !lane.failed && !lane.path->leaving && lane.thread.joinable();
}

bool TransferEngine::can_copy(const Transfer& transfer) const {
  return std::any_of(paths_.begin(), paths_.end(), [&](const auto& path) {
    const Lane& lane = path->lanes[static_cast<std::size_t>(transfer.direction)];
    return path->target == transfer.target && path->rank < transfer.settings.paths && is_usable(lane);
  });
}

// Whether this lane would have the piece there before the others had all that is left.
bool TransferEngine::worth_it(const Lane& lane, const Transfer& transfer, std::size_t bytes) const {
  double others = 0;
  double flying = 0;
  double fastest = 0;
  bool known = lane.rate > 0;
  bool alone = true;
  bool first = true;
  for (const auto& path : paths_) {
    const Lane& other = path->lanes[static_cast<std::size_t>(lane.direction)];
    if (&other == &lane || path->target != transfer.target || path->rank >= transfer.settings.paths) continue;
    if (!is_usable(other)) continue;
    known = known && other.rate > 0;
    alone = false;
    first = first && path->rank > lane.path->rank;
    others += other.rate;
    flying += static_cast<double>(other.flying);
    fastest = std::max(fastest, other.rate);
  }
  if (alone) return true;
  // As long as little is known, one piece is tried, and not the last.
  if (!known) return first || (lane.flying == 0 && transfer.left > bytes);
  if (lane.rate >= fastest) return true;
  const double mine = static_cast<double>(lane.flying + bytes) / lane.rate;
  return mine <= (static_cast<double>(transfer.left) + flying) / others;
}

bool TransferEngine::serves(const Lane& lane, const Transfer& transfer) {
  return transfer.target == lane.path->target && transfer.direction == lane.direction && !transfer.stopping &&
         lane.path->rank < transfer.settings.paths && !transfer.settings.in_place;
}

bool TransferEngine::has_next(const Lane& lane) const {
  if (lane.failed || lane.path->leaving) return false;
  return std::any_of(active_.begin(), active_.end(),
                     [&](const Handle& each) { return serves(lane, *each) && each->to_copy(); });
}

std::optional<TransferEngine::Flying> TransferEngine::next(const Lane& lane, bool& left) {
  if (lane.failed || lane.path->leaving) return std::nullopt;
  for (const Handle& transfer : active_) {
    Transfer& each = *transfer;
    if (!serves(lane, each) || !each.to_copy()) continue;
    const std::size_t piece = each.ready.empty() ? each.next : each.ready.front();
    const std::size_t bytes = each.pieces[piece].bytes;
    if (!worth_it(lane, each, bytes)) {
      left = true;
      continue;
    }
    if (each.ready.empty()) {
      ++each.next;
    } else {
      each.ready.pop_front();
    }
    each.left -= bytes;
    ++each.flying;
    return Flying{transfer, piece, 0, {}};
  }
  return std::nullopt;
}

void TransferEngine::run_lane(Lane& lane) {
  block_signals();
  Patience::sharpen_naps();
  CopyLink& link = *lane.path->link;
  std::deque<Flying> flying;
  unsigned turn = 0;
  Lock lock = locked();
  for (;;) {
    bool left = false;
    try {
      while (flying.size() < CopyLink::depth) {
        std::optional<Flying> found = next(lane, left);
        if (!found) break;
        found->slot = turn;
        turn = (turn + 1) % CopyLink::depth;
        const Piece& piece = found->transfer->pieces[found->piece];
        lane.flying += piece.bytes;
        flying.push_back(*found);
        lock.unlock();
        flying.back().start = Clock::now();
        link.start(lane.direction, flying.back().slot, piece.host, piece.address, piece.bytes);
        relock(lock);
      }
      if (flying.empty()) {
        if (ending_ || lane.path->leaving) return;
        if (!left && may_get_more(lane) && spin(lock, [&] { return has_next(lane) || ending_ || lane.path->leaving; }))
          continue;
        lane.sleeping = true;
        if (left) {  // the others' rates may change: look again
          lane.wake.wait_for(lock, look_again);
        } else {
          lane.wake.wait(lock);
        }
        lane.sleeping = false;
        continue;
      }
      lock.unlock();
      link.finish(lane.direction, flying.front().slot);
      relock(lock);
    } catch (const std::exception& error) {
      if (lock.owns_lock()) lock.unlock();
      link.settle(lane.direction);
      relock(lock);
      lose(lane, flying, error.what());
      continue;
    }
    const Clock::time_point now = Clock::now();
    const Flying done = flying.front();
    flying.pop_front();
    Transfer& transfer = *done.transfer;
    Piece& piece = transfer.pieces[done.piece];
    const Clock::time_point start = std::max(done.start, lane.last_end);
    const double seconds = std::chrono::duration<double>(now - start).count();
    // Of several pieces together: a thread that wakes up late sees the next piece end all the sooner.
    lane.recent_bytes = fading * lane.recent_bytes + static_cast<double>(piece.bytes);
    lane.recent_seconds = fading * lane.recent_seconds + seconds;
    lane.rate = lane.recent_bytes / std::max(lane.recent_seconds, 1e-9);
    lane.last_end = now;
    lane.flying -= piece.bytes;
    lane.bytes += piece.bytes;
    transfer.done += piece.bytes;
    --transfer.flying;
    if (recording_ && events_.size() < most_events) {
      const std::size_t who = lane.path->number * direction_count + static_cast<std::size_t>(lane.direction);
      events_.push_back(
          {false, who, transfer.target, transfer.number, nanoseconds(start), nanoseconds(now), piece.bytes});
    }
    if (piece.slot != nullptr) give(std::exchange(piece.slot, nullptr));
    end_if_done(transfer);
    if (lane.path->leaving) to_waiters_.notify_all();
  }
}

bool TransferEngine::may_get_more(const Lane& lane) const {
  return std::any_of(active_.begin(), active_.end(), [&](const Handle& each) { return serves(lane, *each); });
}

void TransferEngine::wake_lanes(const Transfer* transfer) {
  for (const auto& path : paths_) {
    for (Lane& lane : path->lanes) {
      const bool meant =
          transfer == nullptr || (path->target == transfer->target && path->rank < transfer->settings.paths &&
                                  lane.direction == transfer->direction);
      if (meant && lane.sleeping) lane.wake.notify_one();
    }
  }
}

// The link has failed: the others take what was on it.
void TransferEngine::lose(Lane& lane, std::deque<Flying>& flying, const std::string& what) {
  lane.failed = true;
  lane.flying = 0;
  std::vector<Handle> hurt;
  for (const Flying& each : flying) {
    Transfer& transfer = *each.transfer;
    Piece& piece = transfer.pieces[each.piece];
    --transfer.flying;
    if (transfer.stopping) {
      if (piece.slot != nullptr) give(std::exchange(piece.slot, nullptr));
    } else {
      transfer.ready.push_front(each.piece);
      transfer.left += piece.bytes;
    }
    hurt.push_back(each.transfer);
  }
  flying.clear();
  const std::string told = lane.path->link->name() + ": " + what;
  for (const Handle& transfer : hurt) {
    std::vector<std::string>& lost = transfer->lost_links;
    if (std::find(lost.begin(), lost.end(), told) == lost.end()) lost.push_back(told);
  }
  for (const Handle& transfer : std::vector<Handle>(active_)) {
    if (transfer->target != lane.path->target || transfer->direction != lane.direction) continue;
    if (transfer->settings.in_place) continue;
    if (!can_copy(*transfer)) {
      transfer->link_error = what;
      stop(*transfer);
    } else {
      end_if_done(*transfer);
    }
  }
  wake_lanes();
  if (lane.path->leaving) to_waiters_.notify_all();
}

void TransferEngine::record(bool on) {
  refuse_child();
  const Lock lock = locked();
  recording_ = on;
}

std::vector<TransferEngine::Event> TransferEngine::take_events() {
  refuse_child();
  const Lock lock = locked();
  return std::exchange(events_, {});
}

}  // namespace glake
