"""ONNX graphs: traced, converted, written in forms over the same weights."""
