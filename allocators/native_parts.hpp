// The parts of the module _native; native.cpp puts them together.
#pragma once

#include <nanobind/nanobind.h>

namespace glake::python {

void bind_ort(nanobind::module_& module);  // native_ort.cpp. After the class Pool

}  // namespace glake::python

void bind_bench(nanobind::module_& module);  // native_bench.cpp. After the class Pool
