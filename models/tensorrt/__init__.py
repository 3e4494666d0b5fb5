"""TensorRT and TensorRT-RTX: engines of packages, and what they need."""
