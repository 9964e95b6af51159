"""TensorRT: engines that were built for the machine at hand."""
