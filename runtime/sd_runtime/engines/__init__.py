"""Engines: what runs one component's graph.  `protocol` says what an engine is; `onnxruntime` is the backend."""
