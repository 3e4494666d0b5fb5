// The links of a GPU: its own PCIe link, and a peer GPU's, whose memory is staged through on the way (GLake's
// Multi-path, https://github.com/antgroup/glake).
//
// By a peer, bytes go over its PCIe link to a buffer in its memory and on over NVLink, or whatever there is between the
// two. The second copy is queued on the GPU that the bytes are for, so its memory stays what it is: for that GPU alone.
#pragma once

#include <array>
#include <memory>
#include <string>

#include "copy_link.hpp"
#include "cuda_driver.hpp"

namespace glake {

// Streams of a direction are made by its first copy.
class CudaLink final : public CopyLink {
 public:
  explicit CudaLink(std::shared_ptr<const CudaContext> context);
  ~CudaLink() override;

  [[nodiscard]] const std::string& name() const noexcept override { return name_; }
  void start(Direction direction, unsigned slot, std::byte* host, Address device, std::size_t bytes) override;
  void finish(Direction direction, unsigned slot) override;
  void settle(Direction direction) noexcept override;

 private:
  // A stream for each slot: copies of one stream leave a gap of 6 us on the link between them (H200).
  struct Way {
    std::array<CUstream, depth> streams{};
  };
  Way& way(Direction direction);

  std::shared_ptr<const CudaContext> context_;
  const CudaDriver& driver_;
  std::string name_;
  std::array<Way, direction_count> ways_;
};

class CudaRelay final : public CopyLink {
 public:
  // For the GPU of `own`, by that of `peer`. `staging`: `bytes` of the peer's memory, mapped through the driver's
  // virtual memory management, which the caller keeps for as long as this lives; both GPUs get access to it. Throws
  // DriverError, where the GPUs are no peers too.
  CudaRelay(std::shared_ptr<const CudaContext> own, std::shared_ptr<const CudaContext> peer, Address staging,
            std::size_t bytes);
  ~CudaRelay() override;

  [[nodiscard]] const std::string& name() const noexcept override { return name_; }
  [[nodiscard]] std::size_t most() const noexcept override { return most_; }
  void start(Direction direction, unsigned slot, std::byte* host, Address device, std::size_t bytes) override;
  void finish(Direction direction, unsigned slot) override;
  void settle(Direction direction) noexcept override;

 private:
  struct Way {
    std::array<CUstream, depth> at_peer{};  // between the host and the buffer
    std::array<CUstream, depth> at_own{};   // between the buffer and the memory
    std::array<CUevent, depth> staged{};    // the buffer is filled
  };
  Way& way(Direction direction);
  [[nodiscard]] Address buffer(Direction direction, unsigned slot) const noexcept;

  std::shared_ptr<const CudaContext> own_;
  std::shared_ptr<const CudaContext> peer_;
  const CudaDriver& driver_;
  std::string name_;
  Address staging_;
  std::size_t most_;
  std::array<Way, direction_count> ways_;
};

}  // namespace glake
