// The native core's exceptions as Python's (allocators/errors.py). Call these with the GIL held.
#pragma once

#include <nanobind/nanobind.h>

#include <exception>

#include "pool.hpp"

namespace glake::python {

// A class of allocators/errors.py.
[[nodiscard]] nanobind::object error_class(const char* name);
// The Python exception for a request that does not fit.
[[nodiscard]] nanobind::object to_python(const OutOfMemory& record);
// For nanobind::register_exception_translator. What is not ours propagates to nanobind's own translators.
void translate(const std::exception_ptr& pointer, void*);

}  // namespace glake::python
