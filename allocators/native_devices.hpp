// The part of _native about devices (native_devices.cpp).
#pragma once

#include <nanobind/nanobind.h>

void bind_devices(nanobind::module_& module);
