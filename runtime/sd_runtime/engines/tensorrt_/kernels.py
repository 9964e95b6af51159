"""TensorRT for RTX compiles kernels on the machine that draws: when, and where they are kept."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from typing import Any

from ...bundle.locations import cache_home


class KernelCache:
    """Kernels that TensorRT for RTX has compiled on one GPU, kept in a file from one process to the next."""

    def __init__(self, machine: str) -> None:
        """`machine`: names the GPU and the library's version."""
        self._path = cache_home() / "tensorrt_rtx" / file_name(machine)
        self._cache: Any = None

    def of(self, config: Any) -> Any:
        """The library's own object, made by whichever runtime configuration comes first."""
        if self._cache is None:
            self._cache = config.create_runtime_cache()
            with suppress(OSError):
                self._cache.deserialize(self._path.read_bytes())  # takes nothing where the machine has changed since
        return self._cache

    def save(self) -> None:
        """Nothing depends on it: where the folder cannot be written, kernels are compiled again."""
        if self._cache is None:
            return
        partial = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(bytes(self._cache.serialize()))
            partial.replace(self._path)


def specialised_context(trt: Any, engine: Any, cache: KernelCache) -> Any:
    """A context without memory for activations, which compiles the kernels for its shapes before they run: a graph that
    was recorded with general kernels would keep them.  Graphs are recorded by us, not by the library."""
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED
    config.set_runtime_cache(cache.of(config))
    return engine.create_execution_context(config)


def file_name(text: str) -> str:
    """`text` as a file's name: "NVIDIA L4 sm8.9 1.7.1" → "nvidia-l4-sm8.9-1.7.1"."""
    return re.sub(r"[^a-z0-9._]+", "-", text.lower()).strip("-")
