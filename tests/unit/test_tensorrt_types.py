"""The TensorRT code against the signatures of real packages, where TENSORRT_STUBS says where these are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_tensorrt_types"


@pytest.mark.skipif("TENSORRT_STUBS" not in os.environ, reason="TENSORRT_STUBS names no folders with signatures")
def test_every_call_fits_every_version() -> None:
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "call",
    [
        "Runtime.get_engine_validity",
        "EngineValidity.INVALID",
        "ICudaEngine.create_runtime_config",
        "ICudaEngine.device_memory_size_v2",
        "IRuntimeConfig.set_execution_context_allocation_strategy",
        "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
        "IRuntimeConfig.cuda_graph_strategy",
        "IRuntimeConfig.create_runtime_cache",
        "IRuntimeConfig.set_runtime_cache",
        "IRuntimeCache.serialize",
        "IRuntimeCache.deserialize",
        "IExecutionContext.is_stream_capturable",
        "IExecutionContext.update_device_memory_size_for_shapes",
        "IExecutionContext.set_device_memory",
        "ExecutionContextAllocationStrategy.USER_MANAGED",
        "DynamicShapesKernelSpecializationStrategy.EAGER",
        "CudaGraphStrategy.DISABLED",
    ],
)
def test_tensorrt_for_rtx_has_what_only_a_gpu_could_run(call: str) -> None:
    """Building is done for real in other tests; these names are all that the rest can be held to without a GPU."""
    trt = pytest.importorskip("tensorrt_rtx", reason="pip install tensorrt-rtx-cu13", exc_type=ImportError)
    kind, name = call.split(".")
    assert hasattr(getattr(trt, kind), name)


def test_folders_must_be_given() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TENSORRT_STUBS"}
    done = subprocess.run([SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "no folders with TensorRT's signatures" in done.stderr
