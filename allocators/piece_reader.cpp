#include "piece_reader.hpp"

#include <fcntl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace glake {

void PieceReader::forget() noexcept {
  for (File& each : open_) {
    if (each.descriptor >= 0) ::close(each.descriptor);
    each.descriptor = -1;
  }
}

int PieceReader::open(std::uint64_t owner, std::span<const std::string> files, std::uint32_t file) {
  for (std::size_t i = 0; i < most_open; ++i) {
    const std::size_t place = (last_ + i) % most_open;
    const File& each = open_[place];
    if (each.descriptor >= 0 && each.owner == owner && each.file == file) {
      last_ = place;
      return each.descriptor;
    }
  }
  File& made = open_[next_];
  if (made.descriptor >= 0) ::close(made.descriptor);
  do {
    made.descriptor = ::open(files[file].c_str(), O_RDONLY | O_CLOEXEC);
  } while (made.descriptor < 0 && errno == EINTR);
  if (made.descriptor < 0) throw ReadError{errno, file, 0};
  made.owner = owner;
  made.file = file;
  last_ = next_;
  next_ = (next_ + 1) % most_open;
  return made.descriptor;
}

void PieceReader::fill(int descriptor, const FilePart& part, std::byte* target, std::size_t done) {
  while (done < part.bytes) {
    const ssize_t count = pread(descriptor, target + done, part.bytes - done, static_cast<off_t>(part.offset + done));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw ReadError{errno, part.file, 0};
    if (count == 0) throw ReadError{0, part.file, part.bytes - done};
    done += static_cast<std::size_t>(count);
  }
}

void PieceReader::read_in_place(std::uint64_t owner, std::span<const std::string> files,
                                std::span<const FilePart> parts) {
  for (const FilePart& part : parts) {
    fill(open(owner, files, part.file), part, reinterpret_cast<std::byte*>(part.address), 0);
  }
}

std::byte* PieceReader::read(std::uint64_t owner, std::span<const std::string> files, std::span<const FilePart> parts,
                             std::byte* buffer, bool around_cache) {
  if (around_cache && parts.size() == 1) {
    const FilePart& part = parts.front();
    const int descriptor = open(owner, files, part.file);
    iovec into{buffer, part.bytes};
    ssize_t cached = 0;
    do {
      cached = preadv2(descriptor, &into, 1, static_cast<off_t>(part.offset), RWF_NOWAIT);
    } while (cached < 0 && errno == EINTR);
    if (cached == static_cast<ssize_t>(part.bytes)) return buffer;
    const std::uint64_t begin = part.offset / block * block;
    const std::size_t shift = static_cast<std::size_t>(part.offset - begin);
    const std::size_t wanted = (shift + part.bytes + block - 1) / block * block;
    const int flags = fcntl(descriptor, F_GETFL);
    if (flags >= 0 && fcntl(descriptor, F_SETFL, flags | O_DIRECT) == 0) {
      std::size_t done = 0;
      bool failed = false;
      while (!failed && done < shift + part.bytes) {
        const ssize_t count = pread(descriptor, buffer + done, wanted - done, static_cast<off_t>(begin + done));
        if (count < 0 && errno == EINTR) continue;
        failed = count <= 0;  // the end of the file, and a filesystem that cannot do it, are told apart below
        if (failed) break;
        done += static_cast<std::size_t>(count);
        if (done % block != 0) break;  // the last block of the file
      }
      (void)fcntl(descriptor, F_SETFL, flags);
      if (!failed && done >= shift + part.bytes) return buffer + shift;
    }
  }
  const Address first = parts.front().address;
  std::size_t end = 0;
  for (const FilePart& part : parts) {
    const auto start = static_cast<std::size_t>(part.address - first);
    std::memset(buffer + end, 0, start - end);
    fill(open(owner, files, part.file), part, buffer + start, 0);
    end = start + part.bytes;
  }
  return buffer;
}

}  // namespace glake
