// PieceReader: reads parts of files into memory, for one thread of TransferEngine.
//
// With `pread`: a file that shrinks, or a disk that is gone, is an error here and no SIGBUS. The file that was read
// last stays open for the next part until forget(), as parts of one file follow each other.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "virtual_memory.hpp"

namespace glake {

// `bytes` of a file from `offset`, to be at `address`.
struct FilePart {
  std::uint32_t file = 0;
  std::uint64_t offset = 0;
  std::size_t bytes = 0;
  Address address = 0;
};

// A file that cannot be read, or (code 0) that ends `missing` bytes early.
struct ReadError {
  int code = 0;
  std::uint32_t file = 0;
  std::size_t missing = 0;
};

class PieceReader {
 public:
  // Bytes that a buffer for `bytes` of a file needs: read around the page cache they begin and end at whole blocks.
  static constexpr std::size_t block = 4096;
  static constexpr std::size_t slack = 2 * block;

  PieceReader() = default;
  PieceReader(const PieceReader&) = delete;
  PieceReader& operator=(const PieceReader&) = delete;
  ~PieceReader() { forget(); }

  // Fills `buffer`, that begins at a block and has room for the parts and `slack`, with the parts as they lie behind
  // each other from the first one's address, with zeros between them; returns where they begin in it. `around_cache`:
  // what is not in the page cache is read without going through it, where that can be done. `files`: names, by number;
  // `owner` tells one list of them from another. Throws ReadError.
  std::byte* read(std::uint64_t owner, std::span<const std::string> files, std::span<const FilePart> parts,
                  std::byte* buffer, bool around_cache);
  // Reads each part to its address, which is memory of this process. Throws ReadError.
  void read_in_place(std::uint64_t owner, std::span<const std::string> files, std::span<const FilePart> parts);
  // Closes what is open.
  void forget() noexcept;

 private:
  int open(std::uint64_t owner, std::span<const std::string> files, std::uint32_t file);
  void fill(int descriptor, const FilePart& part, std::byte* target, std::size_t done);

  // The files that were read last: parts of several may take turns (rows of matrices that lie side by side).
  struct File {
    std::uint64_t owner = 0;
    std::uint32_t file = 0;
    int descriptor = -1;
  };
  static constexpr std::size_t most_open = 8;
  std::array<File, most_open> open_;
  std::size_t last_ = 0;  // the one that was used last
  std::size_t next_ = 0;  // the one that goes next
};

}  // namespace glake
