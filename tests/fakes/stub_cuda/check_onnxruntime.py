"""The real ONNX Runtime's CUDA provider and the real cuda.core, driven by this project without a GPU.

    python check_onnxruntime.py BUNDLE [FOLDER]

FOLDER (by default a temporary one) gets stubs of CUDA's libraries, under which kernels do nothing; see driver.c and
runtime.c.  Everything else is real: which graphs load, where each node is placed, what is allocated, copied, waited for
and recorded.  Checked are, for every network of the bundle and the graphs around it:

- the graph that is written for the provider loads, and nothing in it is copied between GPU and host;
- what runs on the CPU is arithmetic of shapes;
- network and sampler step are recorded as one CUDA graph, and the decoder as another, without copies of host memory,
  which may be another's by the time that the graph is launched;
- float16 convolutions and attention may use tensor cores;
- once a shape is known, a step is one graph launch, the host waits for it once, and nothing is allocated;
- closing the pipeline gives everything back.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import provider

STEPS = 12
REQUEST = {"prompt": "a star", "seed": 1, "scheduler": "ddim"}
SHAPES = {
    "Add",
    "Concat",
    "Constant",
    "Div",
    "Gather",
    "Mul",
    "Reshape",
    "Shape",
    "Slice",
    "Squeeze",
    "Sub",
    "Unsqueeze",
}


def main(bundle: str, folder: str | None = None) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        libraries = Path(folder or temporary)
        if os.environ.get("STUB_CUDA") != str(libraries):  # the loader reads its path when a process starts
            provider.libraries(libraries)
            stubs = {"STUB_CUDA": str(libraries), "LD_LIBRARY_PATH": str(libraries)}
            command = [sys.executable, __file__, bundle, str(libraries)]
            return subprocess.run(command, env=os.environ | stubs, check=False).returncode
        for name in provider.SOURCES:  # before anybody finds real ones in the place of an nvidia-* wheel
            ctypes.CDLL(name)
        failed = [what for what, good in (*placements(Path(bundle)), *loop(bundle)) if not good]
    print("\n".join(f"wrong: {what}" for what in failed) or "all as it must be")
    return 1 if failed else 0


def placements(root: Path) -> Iterator[tuple[str, bool]]:
    """Where the nodes of each graph are run."""
    import onnxruntime as ort
    from sd_runtime.bundle.bundle import Bundle

    opened = Bundle.open(root)
    for name, component in opened.manifest.components.items():
        forms = ("cuda",) if "cuda" in component.graphs else tuple(component.graphs)
        for form in forms:
            path = opened.path(component.graphs[form].path)
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
            session = ort.InferenceSession(path, options, providers=["CUDAExecutionProvider"])
            placed: dict[str, Counter[str]] = {}
            for part in session.get_provider_graph_assignment_info():
                nodes = Counter(node.op_type for node in part.get_nodes())
                placed.setdefault(part.ep_name, Counter()).update(nodes)
            on_gpu, on_cpu = (placed.get(f"{kind}ExecutionProvider", Counter()) for kind in ("CUDA", "CPU"))
            print(f"{name}, {form}: {on_gpu.total()} nodes on the GPU, {on_cpu.total()} on the CPU")
            yield f"{name}, {form}: on the CPU: {sorted(on_cpu.keys() - SHAPES)}", not on_cpu.keys() - SHAPES
            copies = [kind for kind in on_gpu if kind.startswith("Memcpy")]
            yield f"{name}, {form}: copies between GPU and host", not copies


def loop(bundle: str) -> Iterator[tuple[str, bool]]:
    """What one picture costs, once its shape is known."""
    from sd_runtime.bundle.bundle import Bundle
    from sd_runtime.pipeline import Pipeline

    driver = ctypes.CDLL("libcuda.so.1")
    driver.stub_count.argtypes, driver.stub_count.restype = [ctypes.c_char_p], ctypes.c_uint64
    driver.stub_live.restype = ctypes.c_size_t
    cudnn = ctypes.CDLL("libcudnn.so.9")
    if Bundle.open(Path(bundle)).manifest.precision == "fp16":
        cudnn.stub_use_tensor_cores()
    counted = ("device", "pinned", "events", "launches", "kernels", "waits", "recorded copies")

    def counts() -> Counter[str]:
        return Counter({name: int(driver.stub_count(name.encode())) for name in counted})

    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sd_runtime").addHandler(handler)
    found, times = [], []
    with Pipeline.load(bundle, device="cuda") as pipeline:
        for steps in (STEPS, 2 * STEPS) * 6:
            before, start = counts(), time.thread_time()
            pipeline(**REQUEST, num_inference_steps=steps)
            times.append(time.thread_time() - start)
            found.append({name: count - before[name] for name, count in counts().items()})
    gc.collect()
    yield "memory on the GPU after closing", driver.stub_live() == 0
    few, many = found[-2:]
    launches, kernels, waits = ((many[name] - few[name]) / STEPS for name in ("launches", "kernels", "waits"))
    host = (statistics.median(times[3::2]) - statistics.median(times[2::2])) / STEPS
    print(
        f"a step: {launches:g} graph launch of {kernels:g} kernels, {waits:g} wait, {host * 1e6:.0f} µs of the host, "
        "the stub's included"
    )
    yield f"warnings: {warnings}", not warnings
    yield "tensor cores are forbidden to float16", cudnn.stub_refused() == 0
    yield "a step is one graph launch", launches == 1
    yield "the host waits at most once a step", waits <= 1
    yield "copies from or to the host in a recording", not sum(counts["recorded copies"] for counts in found)
    kept = {name: many[name] for name in ("device", "pinned", "events")}
    yield f"allocated once the shape is known: {kept}", not any(kept.values())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
