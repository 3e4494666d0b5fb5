// The pool as PyTorch's allocator: C functions with the signatures of torch.cuda.memory.CUDAPluggableAllocator
// (torch/csrc/cuda/CUDAPluggableAllocator.h), which torch_face.py hands to PyTorch by name.
//
// `device` is the index of a CUDA device; -1 is the host, for tests. `stream` is a cudaStream_t: the memory is ordered
// on it, as if by the pool's allocate(bytes, tag, stream). Thread-safe. They work for as long as the process lives:
// the pools behind them are never destroyed. Failures are recorded with the device's allocator (see
// OrtDeviceAllocator), so that Pool.explain and Pool.failures tell them.
//
// There are two ways to allocate, because PyTorch treats a null pointer in two ways (2.11 to 2.13):
// - In front of a MemPool stands PyTorch's caching allocator. It takes null for "out of memory": it gives back what it
//   caches, asks again, and at last raises torch.OutOfMemoryError. An exception would skip all that.
// - As the allocator of the whole process nothing looks at the pointer: a null would become a tensor, and the first
//   kernel on it an illegal access, which ends the process's CUDA context. An exception that derives from
//   std::exception becomes a RuntimeError with its text.
#pragma once

#include <sys/types.h>

extern "C" {

// For a MemPool. Null for 0 bytes, and for a request that failed.
__attribute__((visibility("default"))) void* glake_torch_try_allocate(ssize_t bytes, int device, void* stream) noexcept;
// For the whole process. Null for 0 bytes; throws glake::AllocationFailed (a std::bad_alloc).
__attribute__((visibility("default"))) void* glake_torch_allocate(ssize_t bytes, int device, void* stream);
// Takes back what either gave. A pointer that is not in use is reported on stderr and left alone. The pool orders the
// block by the stream of its allocation, which is the one PyTorch passes here.
__attribute__((visibility("default"))) void glake_torch_free(void* address, ssize_t bytes, int device,
                                                             void* stream) noexcept;
}
