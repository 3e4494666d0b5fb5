// capture_python_stack: where in the Python program is this thread? For reports; without a header of Python's.
#pragma once

#include <string>

namespace glake {

// Captures the stack of the calling thread: one line "FILE:LINE in FUNCTION" per frame, innermost first, at most 24,
// without the frames of this package at the top. Text in brackets where there is none: a native thread, an
// interpreter that shuts down, no interpreter.
//
// Takes the interpreter's lock (GIL) where the thread is Python's, so call it BEFORE taking a lock that a thread
// with the GIL may wait for (the pool's). A thread that Python does not know, such as a worker of ONNX Runtime,
// never waits for the GIL here: the thread that holds the GIL may be waiting for that worker.
// Leaves a Python exception that is set as it is.
[[nodiscard]] std::string capture_python_stack() noexcept;

// Sets what capture_python_stack() calls; null switches it off. The module does both (native_debug.cpp).
using StackCapture = std::string (*)();
void set_stack_capture(StackCapture capture) noexcept;

}  // namespace glake
