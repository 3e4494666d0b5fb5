"""TensorRT and TensorRT-RTX: engines built from ONNX models, kept in packages, and run on a pool."""
