"""TensorRT engines: planned, built, checked, put into a bundle."""
