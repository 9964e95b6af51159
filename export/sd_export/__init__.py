"""Export Stable Diffusion checkpoints to bundles of ONNX graphs that sd_runtime runs."""
