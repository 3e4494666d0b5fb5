#include "host_memory.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>

#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U  // Linux 6.3
#endif

namespace glake {
namespace {

std::string read_word(const char* path) {
  std::ifstream file(path);
  std::string word;
  file >> word;
  return word.empty() ? "unknown" : word;
}

[[noreturn]] void fail(const std::string& attempt, int error) {
  const char* symbol = strerrorname_np(error);
  std::string message =
      attempt + " failed: " + (symbol != nullptr ? symbol : "error") + " (" + std::strerror(error) + ")";
  if (error == ENOMEM) {
    message += ". Either the machine is out of memory, or this process has too many mappings (vm.max_map_count = " +
               read_word("/proc/sys/vm/max_map_count") +
               ") or too much address space (ulimit -v). Lower the pool's limit, or raise the one that was hit.";
  } else if (error == EMFILE) {
    message += ". This process has too many open files: raise `ulimit -n`.";
  } else if (error == ENFILE) {
    message += ". The machine has too many open files: raise fs.file-max.";
  } else if (error == EFBIG) {
    message += ". This process may not make files that large: raise `ulimit -f`.";
  }
  throw DriverError(message);
}

std::string amount(std::size_t bytes) { return std::to_string(bytes) + " bytes"; }

// A call that must not fail and did: memory stays held, which the log should say.
void report(const char* what, std::size_t bytes) noexcept {
  std::fprintf(stderr, "glake-infer: %s of %zu bytes failed: %s. The memory stays held by this process.\n", what, bytes,
               std::strerror(errno));
}

// -1 and errno where it fails.
int create_file(unsigned flags) noexcept {
  const int descriptor = memfd_create(HostMemory::name, flags | MFD_NOEXEC_SEAL);
  return descriptor < 0 && errno == EINVAL ? memfd_create(HostMemory::name, flags) : descriptor;
}

constexpr int frozen_seals = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;

Address to_address(const void* pointer) noexcept { return reinterpret_cast<Address>(pointer); }
void* to_pointer(Address address) noexcept { return reinterpret_cast<void*>(address); }

}  // namespace

HostMemory::HostMemory() {
  descriptor_ = create_file(MFD_CLOEXEC);
  if (descriptor_ < 0) fail("memfd_create (the file that backs the host pool)", errno);
}

HostMemory::~HostMemory() { close(descriptor_); }

std::size_t HostMemory::free_bytes() const noexcept {
  try {
    std::ifstream file("/proc/meminfo");
    std::string key;
    std::size_t kib = 0;
    std::string unit;
    while (file >> key >> kib >> unit) {
      if (key == "MemAvailable:") return kib * 1024;
    }
  } catch (...) {  // a figure for an error message is not worth another error
  }
  return 0;
}

Address HostMemory::do_reserve(std::size_t bytes) {
  // mmap aligns to a page only: reserve a granule more, then cut the ends off.
  const std::size_t padded = bytes + granule;
  void* start = mmap(nullptr, padded, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) fail("reserving " + amount(bytes) + " of address space (mmap)", errno);
  const Address first = to_address(start);
  const Address aligned = (first + granule - 1) / granule * granule;
  if (aligned != first) munmap(start, aligned - first);
  if (const std::size_t rest = first + padded - (aligned + bytes); rest != 0) munmap(to_pointer(aligned + bytes), rest);
  madvise(to_pointer(aligned), bytes, MADV_DONTFORK);  // mappings over it get the same flag and so can merge
  return aligned;
}

void HostMemory::do_release(Address address, std::size_t bytes) noexcept {
  if (munmap(to_pointer(address), bytes) != 0) report("munmap", bytes);
}

ChunkHandle HostMemory::do_create(std::size_t bytes) {
  for (auto hole = holes_.begin(); hole != holes_.end(); ++hole) {
    if (hole->second < bytes) continue;
    const auto [offset, size] = *hole;
    if (size == bytes) {
      holes_.erase(hole);
    } else {
      auto node = holes_.extract(hole);  // reuses the node: nothing can fail from here on
      node.key() = offset + bytes;
      node.mapped() = size - bytes;
      holes_.insert(std::move(node));
    }
    return {offset, bytes};
  }
  const std::uint64_t offset = file_bytes_;
  if (ftruncate(descriptor_, static_cast<off_t>(offset + bytes)) != 0) {
    fail("growing the host pool's memory file by " + amount(bytes) + " (ftruncate)", errno);
  }
  file_bytes_ += bytes;
  return {offset, bytes};
}

ChunkHandle HostMemory::do_create_shared(std::size_t bytes) {
  const int descriptor = create_file(MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (descriptor < 0) fail("creating " + amount(bytes) + " of shared memory (memfd_create)", errno);
  if (ftruncate(descriptor, static_cast<off_t>(bytes)) != 0) {
    const int error = errno;
    close(descriptor);
    fail("creating " + amount(bytes) + " of shared memory (ftruncate)", error);
  }
  return {0, bytes, descriptor};
}

ChunkHandle HostMemory::do_adopt(int descriptor, std::size_t bytes) {
  struct stat status{};
  if (fstat(descriptor, &status) != 0) {
    fail("looking at file descriptor " + std::to_string(descriptor) + " (fstat)", errno);
  }
  // A shorter file, or one that can still shrink, would kill whoever reads behind its end (SIGBUS).
  const int seals = fcntl(descriptor, F_GET_SEALS);
  if (static_cast<std::size_t>(status.st_size) != bytes || seals < 0 || (seals & frozen_seals) != frozen_seals) {
    throw DriverError("taking over " + amount(bytes) + " of shared memory failed: what came is " +
                      (seals < 0 ? std::string("no memory file") : "a memory file of " + amount(status.st_size)) +
                      ", where one of that size was expected that nobody can change any more");
  }
  return {0, bytes, descriptor};
}

void HostMemory::do_destroy(ChunkHandle handle) noexcept {
  if (handle.descriptor >= 0) {
    close(handle.descriptor);
    return;
  }
  int result = 0;
  do {
    result = fallocate(descriptor_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(handle.value),
                       static_cast<off_t>(handle.bytes));
  } while (result != 0 && errno == EINTR);
  if (result != 0) return report("fallocate(FALLOC_FL_PUNCH_HOLE)", handle.bytes);
  try {
    auto [hole, inserted] = holes_.emplace(handle.value, handle.bytes);
    if (const auto next = std::next(hole); next != holes_.end() && hole->first + hole->second == next->first) {
      hole->second += next->second;
      holes_.erase(next);
    }
    if (hole != holes_.begin()) {
      const auto previous = std::prev(hole);
      if (previous->first + previous->second == hole->first) {
        previous->second += hole->second;
        holes_.erase(hole);
      }
    }
  } catch (...) {  // out of memory for the list's node: only file offsets are lost, and they are plenty
  }
}

void HostMemory::do_map(Address address, ChunkHandle handle, Access access) {
  void* target = to_pointer(address);
  const int descriptor = handle.descriptor >= 0 ? handle.descriptor : descriptor_;
  // Linux before 6.7 refuses to map a sealed file as shared even for reading; nobody writes to the private mapping, so
  // its pages are the file's all the same.
  const bool writable = access == Access::read_write;
  if (mmap(target, handle.bytes, writable ? PROT_READ | PROT_WRITE : PROT_READ,
           (writable ? MAP_SHARED : MAP_PRIVATE) | MAP_FIXED, descriptor,
           static_cast<off_t>(handle.value)) == MAP_FAILED) {
    fail("mapping " + amount(handle.bytes) + " of the host pool (mmap)", errno);
  }
  if (madvise(target, handle.bytes, MADV_DONTFORK) != 0) {
    const int error = errno;
    do_unmap(address, handle.bytes);
    fail("keeping " + amount(handle.bytes) + " of the host pool from children of fork (madvise)", error);
  }
}

void HostMemory::do_unmap(Address address, std::size_t bytes) noexcept {
  // Where the process has as many mappings as it may, the kernel refuses even this. Then the range stays mapped
  // until release(), which takes mappings away and adds none.
  if (mmap(to_pointer(address), bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) ==
          MAP_FAILED &&
      errno != ENOMEM) {
    report("unmapping", bytes);
  }
}

void HostMemory::do_protect(Address address, std::size_t bytes, Access access) {
  int protection = PROT_NONE;
  if (access == Access::read_only) protection = PROT_READ;
  if (access == Access::read_write) protection = PROT_READ | PROT_WRITE;
  if (mprotect(to_pointer(address), bytes, protection) != 0) {
    fail("changing the access to " + amount(bytes) + " of the host pool (mprotect)", errno);
  }
}

void HostMemory::do_freeze(ChunkHandle handle, std::span<const Address> addresses) {
  if (handle.descriptor < 0) {
    for (const Address address : addresses) do_protect(address, handle.bytes, Access::read_only);
    return;
  }
  for (const Address address : addresses) do_map(address, handle, Access::read_only);  // over the writable mapping
  if (fcntl(handle.descriptor, F_ADD_SEALS, frozen_seals) != 0) {
    fail("sealing " + amount(handle.bytes) + " of shared memory (F_ADD_SEALS)", errno);
  }
}

Address HostMemory::do_map_file(int descriptor, std::size_t bytes, Address address) {
  struct stat status{};
  if (fstat(descriptor, &status) != 0)
    fail("looking at file descriptor " + std::to_string(descriptor) + " (fstat)", errno);
  // Touching a page behind the end of a file kills the process (SIGBUS): refuse it here.
  if (!S_ISREG(status.st_mode) || static_cast<std::uint64_t>(status.st_size) < bytes) {
    throw DriverError("mapping " + amount(bytes) + " of file descriptor " + std::to_string(descriptor) +
                      " failed: it is " +
                      (S_ISREG(status.st_mode) ? "a file of " + std::to_string(status.st_size) + " bytes"
                                               : std::string("not a regular file")) +
                      ". Map a regular file that is at least as long.");
  }
  void* start = mmap(to_pointer(address), bytes, PROT_READ, MAP_SHARED | (address != 0 ? MAP_FIXED : 0), descriptor, 0);
  if (start == MAP_FAILED)
    fail("mapping " + amount(bytes) + " of file descriptor " + std::to_string(descriptor) + " (mmap)", errno);
  return to_address(start);
}

void HostMemory::do_unmap_file(Address address, std::size_t bytes) noexcept {
  if (munmap(to_pointer(address), bytes) != 0) report("munmap of a file", bytes);
}

void HostMemory::do_fill(Address address, std::size_t bytes, unsigned char value, StreamHandle) {
  std::memset(to_pointer(address), value, bytes);
}

void HostMemory::do_read(void* target, Address source, std::size_t bytes) {
  std::memcpy(target, to_pointer(source), bytes);
}

}  // namespace glake
