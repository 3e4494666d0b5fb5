// The part of _native about transfers (native_transfers.cpp).
#pragma once

#include <nanobind/nanobind.h>

void bind_transfers(nanobind::module_& module);
