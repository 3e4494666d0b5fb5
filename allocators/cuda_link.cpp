#include "cuda_link.hpp"

#include "patience.hpp"

namespace glake {

namespace {

std::string short_name(const CudaContext& context) { return "cuda:" + std::to_string(context.index()); }

using Streams = std::array<CUstream, CopyLink::depth>;

void make_streams(const CudaContext& context, Streams& streams) {
  const CurrentContext current(context);
  for (CUstream& stream : streams) {
    if (stream != nullptr) continue;
    context.check(context.driver.stream_create(&stream, CU_STREAM_NON_BLOCKING), "making a stream (cuStreamCreate)");
  }
}

void make_events(const CudaContext& context, std::array<CUevent, CopyLink::depth>& events) {
  const CurrentContext current(context);
  for (CUevent& event : events) {
    if (event != nullptr) continue;
    context.check(context.driver.event_create(&event, CU_EVENT_DISABLE_TIMING), "making an event (cuEventCreate)");
  }
}

void end(const CudaContext& context, const Streams& streams) noexcept {
  const CurrentContext current(context);
  for (const CUstream stream : streams) {
    if (stream != nullptr)
      context.report(context.driver.stream_destroy(stream), "destroying a stream (cuStreamDestroy)", 0);
  }
}

void end(const CudaContext& context, const std::array<CUevent, CopyLink::depth>& events) noexcept {
  const CurrentContext current(context);
  for (const CUevent event : events) {
    if (event != nullptr)
      context.report(context.driver.event_destroy(event), "destroying an event (cuEventDestroy)", 0);
  }
}

void settle_streams(const CudaContext& context, const Streams& streams) noexcept {
  const CurrentContext current(context);
  const RelaxedCapture relaxed(context.driver);
  for (const CUstream stream : streams) {  // fails where the context is lost: then nothing runs there
    if (stream != nullptr) (void)context.driver.stream_synchronize(stream);
  }
}

void copy(const CudaContext& context, Direction direction, std::byte* host, Address device, std::size_t bytes,
          CUstream stream) {
  const CudaDriver& driver = context.driver;
  if (direction == Direction::to_device) {
    context.check(driver.memcpy_htod_async(device, host, bytes, stream), "copying from the host (cuMemcpyHtoDAsync)",
                  bytes);
  } else {
    context.check(driver.memcpy_dtoh_async(host, device, bytes, stream), "copying to the host (cuMemcpyDtoHAsync)",
                  bytes);
  }
}

void record(const CudaContext& context, CUevent event, CUstream stream) {
  context.check(context.driver.event_record(event, stream), "marking a copy (cuEventRecord)");
}

void wait_for(const CudaContext& context, CUstream stream) {
  const CurrentContext current(context);
  const RelaxedCapture relaxed(context.driver);
  CUresult result = CUDA_ERROR_NOT_READY;
  Patience patience;
  while ((result = context.driver.stream_query(stream)) == CUDA_ERROR_NOT_READY) patience.wait();
  context.check(result, "waiting for a copy (cuStreamQuery)");
}

}  // namespace

CudaLink::CudaLink(std::shared_ptr<const CudaContext> context)
    : context_(std::move(context)), driver_(context_->driver), name_(short_name(*context_)) {}

CudaLink::~CudaLink() {
  for (const Way& way : ways_) end(*context_, way.streams);
}

CudaLink::Way& CudaLink::way(Direction direction) {
  Way& way = ways_[static_cast<std::size_t>(direction)];
  if (way.streams.back() == nullptr) make_streams(*context_, way.streams);
  return way;
}

void CudaLink::start(Direction direction, unsigned slot, std::byte* host, Address device, std::size_t bytes) {
  const CUstream stream = way(direction).streams[slot];
  const CurrentContext current(*context_);
  copy(*context_, direction, host, device, bytes, stream);
}

void CudaLink::finish(Direction direction, unsigned slot) { wait_for(*context_, way(direction).streams[slot]); }

void CudaLink::settle(Direction direction) noexcept {
  settle_streams(*context_, ways_[static_cast<std::size_t>(direction)].streams);
}

CudaRelay::CudaRelay(std::shared_ptr<const CudaContext> own, std::shared_ptr<const CudaContext> peer, Address staging,
                     std::size_t bytes)
    : own_(std::move(own)),
      peer_(std::move(peer)),
      driver_(own_->driver),
      name_(short_name(*own_) + " by " + short_name(*peer_)),
      staging_(staging),
      most_(bytes / (depth * direction_count)) {
  int can = 0;
  own_->check(driver_.can_access_peer(&can, own_->device(), peer_->device()),
              "asking whether GPUs are peers (cuDeviceCanAccessPeer)");
  if (can == 0) {
    throw DriverError("making a path to " + own_->name() + " by " + peer_->name() +
                      " failed: the two cannot reach each other's memory (no peer-to-peer access).");
  }
  std::array<CUmemAccessDesc, 2> access{};
  access[0].location = {CU_MEM_LOCATION_TYPE_DEVICE, {peer_->device()}};
  access[1].location = {CU_MEM_LOCATION_TYPE_DEVICE, {own_->device()}};
  for (CUmemAccessDesc& each : access) each.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  const CurrentContext current(*peer_);
  for (CUdeviceptr place = staging_; place < staging_ + bytes;) {  // of whole mappings, as access is theirs
    CUdeviceptr base = 0;
    std::size_t size = 0;
    peer_->check(driver_.mem_address_range(&base, &size, place), "asking how memory is mapped (cuMemGetAddressRange)");
    peer_->check(driver_.mem_set_access(base, size, access.data(), access.size()),
                 "letting another GPU use memory (cuMemSetAccess)", size);
    place = base + size;
  }
}

CudaRelay::~CudaRelay() {
  for (const Way& way : ways_) {
    end(*peer_, way.at_peer);
    end(*own_, way.at_own);
  }
  end(*peer_, ways_[0].staged);
  end(*own_, ways_[1].staged);
}

CudaRelay::Way& CudaRelay::way(Direction direction) {
  Way& way = ways_[static_cast<std::size_t>(direction)];
  if (way.staged.back() == nullptr) {
    make_streams(*peer_, way.at_peer);
    make_streams(*own_, way.at_own);
    make_events(direction == Direction::to_device ? *peer_ : *own_, way.staged);
  }
  return way;
}

Address CudaRelay::buffer(Direction direction, unsigned slot) const noexcept {
  return staging_ + (static_cast<std::size_t>(direction) * depth + slot) * most_;
}

void CudaRelay::start(Direction direction, unsigned slot, std::byte* host, Address device, std::size_t bytes) {
  const Way& used = way(direction);
  const Address staged = buffer(direction, slot);
  const auto hop = [&](CUdeviceptr target, CUdeviceptr source) {
    own_->check(driver_.memcpy_dtod_async(target, source, bytes, used.at_own[slot]),
                "copying between GPUs (cuMemcpyDtoDAsync)", bytes);
  };
  const auto wait = [&](const CudaContext& context, CUstream stream) {
    context.check(driver_.stream_wait_event(stream, used.staged[slot], 0),
                  "ordering copies of two GPUs (cuStreamWaitEvent)");
  };
  if (direction == Direction::to_device) {
    {
      const CurrentContext current(*peer_);
      copy(*peer_, direction, host, staged, bytes, used.at_peer[slot]);
      record(*peer_, used.staged[slot], used.at_peer[slot]);
    }
    const CurrentContext current(*own_);
    wait(*own_, used.at_own[slot]);
    hop(device, staged);
  } else {
    {
      const CurrentContext current(*own_);
      hop(staged, device);
      record(*own_, used.staged[slot], used.at_own[slot]);
    }
    const CurrentContext current(*peer_);
    wait(*peer_, used.at_peer[slot]);
    copy(*peer_, direction, host, staged, bytes, used.at_peer[slot]);
  }
}

void CudaRelay::finish(Direction direction, unsigned slot) {
  const Way& used = way(direction);
  direction == Direction::to_device ? wait_for(*own_, used.at_own[slot]) : wait_for(*peer_, used.at_peer[slot]);
}

void CudaRelay::settle(Direction direction) noexcept {
  const Way& used = ways_[static_cast<std::size_t>(direction)];
  settle_streams(*peer_, used.at_peer);
  settle_streams(*own_, used.at_own);
}

}  // namespace glake
