#include "native_errors.hpp"

#include <nanobind/stl/string.h>

namespace nb = nanobind;
using namespace nb::literals;

namespace glake::python {
namespace {

void raise(const nb::object& exception) {
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(exception.ptr())), exception.ptr());
}

}  // namespace

nb::object error_class(const char* name) { return nb::module_::import_("glake_infer.allocators.errors").attr(name); }

nb::object to_python(const OutOfMemory& record) {
  nb::list holders;
  for (const Holder& holder : record.holders) {
    holders.append(nb::make_tuple(holder.label, tag_name(holder.tag), holder.bytes));
  }
  return error_class("OutOfMemoryError")("requested"_a = record.requested, "active"_a = record.active,
                                         "idle"_a = record.idle, "reserved"_a = record.reserved,
                                         "limit"_a = record.limit, "needed_limit"_a = record.needed_limit,
                                         "device_free"_a = record.device_free, "holders"_a = holders,
                                         "device_full"_a = record.device_full, "refusal"_a = record.refusal);
}

void translate(const std::exception_ptr& pointer, void*) {
  try {
    std::rethrow_exception(pointer);
  } catch (const OutOfMemoryError& error) {
    raise(to_python(error.record));
  } catch (const InvalidPointer& error) {
    raise(error_class("InvalidPointerError")(error.what()));
  } catch (const LimitTooLow& error) {
    raise(error_class("PoolInUseError").attr("limit_too_low")(error.limit, error.active));
  } catch (const ForkedProcess&) {
    raise(error_class("ForkedProcessError")());
  } catch (const DriverError& error) {
    raise(error_class("DriverError")(error.what()));
  }
}

}  // namespace glake::python
