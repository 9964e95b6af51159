"""The networks of a bundle as engines, loaded side by side, each only after its files' digests were checked.

Where TensorRT engines in the bundle fit this machine they are used; ONNX Runtime runs the rest, or all, and shapes that
no engine was built for.  Denoising and decoding stay on the GPU where all that they take is there; otherwise the host
leads them, with the same result.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from typing import TYPE_CHECKING

from ..bundle.bundle import Bundle
from ..bundle.manifest import Component, EnginePrecision, Graph
from ..errors import DependencyError, EngineError, OutOfMemoryError, UsageError
from ..loop.host import Guidance, Step, denoise
from ..noise import NoiseSource
from ..notices import warn
from ..sampling import SamplingPlan
from ..tensor import Array
from .device import DeviceEngine
from .onnxruntime_.cpu import OnnxRuntimeEngine, has_cuda, import_onnxruntime
from .protocol import Engine

if TYPE_CHECKING:
    from ..loop.device import DeviceDenoiser
    from ..loop.device_decoder import DeviceDecoder
    from .gpu.gpu import Gpu
    from .tensorrt_.selection import TensorRTBackend

DEVICES = ("auto", "cpu", "cuda")
EAGER = ("text_encoder", "unet", "vae_decoder")  # what every picture needs; the rest is loaded when first asked for
LOOP = ("unet", "plain"), ("sampler_step", "plain"), ("sampler_step", "guided")
DECODER = ("vae_decoder", "plain"), ("pixels", "plain")

Denoiser = Callable[[SamplingPlan, Array, Array, Guidance, NoiseSource], Generator[Step]]  # `denoise` without the UNet


def cpu_engine(bundle: Bundle, component: Component, graph: Graph, threads: int | None = None) -> OnnxRuntimeEngine:
    """ONNX Runtime on the CPU for one of a component's graphs, whose weights were verified."""
    return OnnxRuntimeEngine(
        bundle.read(graph.path),
        bundle.path(graph.path).parent,
        graph.inputs,
        graph.outputs,
        weights_size=0 if component.weights is None else bundle.manifest.files[component.weights].size,
        float16=bundle.manifest.precision == "fp16",
        threads=threads,
    )


class Components:
    """Engines by component name and graph form; loading is thread-safe, `close` releases all of them."""

    def __init__(
        self,
        bundle: Bundle,
        gpu: Gpu | None = None,
        tensorrt: TensorRTBackend | None = None,
        *,
        threads: int | None = None,
    ) -> None:
        """`gpu`: where everything runs that can; None: the CPU runs all.  `tensorrt`: engines on that GPU.  Both belong
        to this object from now on."""
        self._bundle, self._gpu, self._tensorrt, self._threads = bundle, gpu, tensorrt, threads
        self._engines: dict[tuple[str, str], Engine] = {}
        self._lock, self._setting_up, self._closed = threading.Lock(), threading.Lock(), False

    @classmethod
    def open(cls, bundle: Bundle, device: str, *, threads: int | None = None) -> Components:
        """Choose the library: TensorRT if the bundle has engines that fit, unless `device` is cpu; else ONNX Runtime,
        with a warning where there were engines.  UsageError, DependencyError, EngineError: `device` cannot be had."""
        if device not in DEVICES:
            raise UsageError("device", got=device, accepted=", ".join(DEVICES))
        if device == "cpu":
            return cls(bundle, threads=threads)
        if bundle.manifest.engines:
            from .tensorrt_.selection import open_tensorrt

            if (tensorrt := open_tensorrt(bundle)) is not None:
                return cls(bundle, tensorrt.gpu, tensorrt, threads=threads)
        return cls(bundle, open_gpu(needed=device == "cuda"), threads=threads)

    @property
    def on_cpu(self) -> bool:
        """Whether the CPU runs everything."""
        return self._gpu is None

    @cached_property
    def _onnxruntime_has_cuda(self) -> bool:
        if self._gpu is None:
            return False
        try:
            return has_cuda()
        except DependencyError:  # TensorRT does without ONNX Runtime what it has engines for
            return False

    def precision(self, name: str) -> EnginePrecision:
        """That a component's plain graph is computed in here."""
        built = self._tensorrt.records(name, "plain") if self._tensorrt is not None else []
        return built[0].precision if built else self._bundle.manifest.precision

    def batch_sizes(self, most: int, rows: int, latent: tuple[int, ...]) -> Sequence[int]:
        """How many pictures at once, up to `most`, are good for the UNet: those that it has engines for, if any.

        rows: of its batch for each picture; latent: (C, h, w)."""
        if self.on_cpu:
            return (1,)
        if self._tensorrt is not None:
            built = [record.profile["sample"] for record in self._tensorrt.records("unet", "plain")]
            sizes = [n for n in range(1, most + 1) if any(allowed.accepts((n * rows, *latent)) for allowed in built)]
            if sizes or not self._onnxruntime_has_cuda:
                return sizes or (1,)
        return range(1, most + 1)

    def preload(self, names: Iterable[str] = EAGER) -> None:
        """Load several components at once, each on a thread of its own; if one fails, release all."""
        if self._tensorrt is None:
            import_onnxruntime()  # once, before the threads race for it
        try:
            with ThreadPoolExecutor() as pool:
                for future in [pool.submit(self.engine, name) for name in names]:
                    future.result()
        except BaseException:
            self.close()
            raise

    def engine(self, name: str, form: str = "plain") -> Engine:
        """The engine of a component in one of its graph forms.  BundleError or EngineError say why there is none."""
        with self._lock:
            if self._closed:
                raise EngineError("the pipeline was closed")
            known = self._engines.get((name, form))
        if known is not None:
            return known
        loaded = self._load(name, form)
        with self._lock:
            kept = self._engines.setdefault((name, form), loaded)
        if kept is not loaded:  # another thread was quicker
            loaded.close()
        return kept

    def _load(self, name: str, form: str) -> Engine:
        graph = partial(self._load_graph, name, form)
        built = self._tensorrt.engine(name, form, graph) if self._tensorrt is not None else None
        return built if built is not None else graph()

    def _load_graph(self, name: str, form: str) -> Engine:
        """A session; for the plain graph, of the form that is written for the device, where there is one."""
        tuned = "cuda" if self._onnxruntime_has_cuda else "cpu"
        if form != "plain" or tuned not in self._bundle.component(name).graphs:
            return self._session(name, form)
        try:
            return self._session(name, tuned)
        except OutOfMemoryError:
            raise
        except EngineError as error:
            warn(f"{error}; the plain graph of {name} is used instead, which is slower")
            return self._session(name, form)

    def _session(self, name: str, form: str) -> Engine:
        bundle, component = self._bundle, self._bundle.component(name)
        graph = component.graph(form)
        bundle.verify([] if component.weights is None else [component.weights])
        if self._gpu is not None and self._onnxruntime_has_cuda:
            from .onnxruntime_.cuda import OnnxRuntimeCudaEngine

            folder = bundle.path(graph.path).parent
            return OnnxRuntimeCudaEngine(
                self._gpu,
                bundle.read(graph.path),
                folder,
                graph.inputs,
                graph.outputs,
                float16=component.weights is not None and bundle.manifest.precision == "fp16",
            )
        return cpu_engine(bundle, component, graph, self._threads)

    def denoiser(self, guidance: Guidance) -> Denoiser:
        """The denoising loop: on the GPU if all that it takes is there and guidance is linear, else the host's."""
        with self._setting_up:
            on_device = self._device_denoiser
        return partial(denoise, self.engine("unet")) if on_device is None or guidance.rescale else on_device

    @cached_property
    def _device_denoiser(self) -> DeviceDenoiser | None:
        engines = self._all_on_gpu(LOOP)
        if engines is None:
            return None
        from ..loop.device import DeviceDenoiser

        unet, plain, guided = engines
        return DeviceDenoiser(unet, {"plain": plain, "guided": guided})

    @property
    def device_decoder(self) -> DeviceDecoder | None:
        """The VAE decoder together with the conversion to pixels, if both run on the GPU."""
        with self._setting_up:
            return self._device_decoder

    @cached_property
    def _device_decoder(self) -> DeviceDecoder | None:
        engines = self._all_on_gpu(DECODER)
        if engines is None:
            return None
        from ..loop.device_decoder import DeviceDecoder

        decoder, pixels = engines
        return DeviceDecoder(decoder, pixels, self._bundle.manifest.latent.pixels)

    def _all_on_gpu(self, wanted: Iterable[tuple[str, str]]) -> list[DeviceEngine] | None:
        """These engines, if the bundle has them all and all of them run on the GPU, whatever library runs them."""
        components = self._bundle.manifest.components
        if any(name not in components or form not in components[name].graphs for name, form in wanted):
            return None
        if not all(self._runs_on_gpu(name, form) for name, form in wanted):
            return None
        engines = [self.engine(name, form) for name, form in wanted]
        return [engine for engine in engines if isinstance(engine, DeviceEngine)]

    def _runs_on_gpu(self, name: str, form: str) -> bool:
        built = self._tensorrt is not None and bool(self._tensorrt.records(name, form))
        return built or self._onnxruntime_has_cuda

    def close(self) -> None:
        """Release the engines, what runs them in loops first; a second time, do nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for name in ("_device_denoiser", "_device_decoder"):
            if self.__dict__.get(name) is not None:
                self.__dict__[name].close()
        with self._lock:
            for engine in self._engines.values():
                engine.close()
            self._engines.clear()
        if self._tensorrt is not None:
            self._tensorrt.close()
        if self._gpu is not None:
            self._gpu.close()


def open_gpu(*, needed: bool) -> Gpu | None:
    """The GPU for ONNX Runtime; None for the CPU: if it is a build for CPUs, or, with a warning, if no GPU is usable.
    DependencyError, EngineError: there is none, and it is `needed`, or there is one that cannot be used for want of
    libraries."""
    if not has_cuda():
        if not needed:
            return None
        raise DependencyError(
            "device cuda: this ONNX Runtime has no CUDA provider",
            remedy='pip uninstall onnxruntime, then pip install "sd-lean[gpu]"',
        )
    from .gpu.gpu import Gpu
    from .onnxruntime_.cuda import load_cuda_libraries

    try:
        gpu = Gpu()
    except (DependencyError, EngineError) as error:
        if needed:
            raise
        warn(f"{error}; the CPU is used instead")
        return None
    try:
        load_cuda_libraries()
    except BaseException:
        gpu.close()
        raise
    return gpu
