"""The networks of a bundle as engines, loaded side by side, each only after its files' digests were checked."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from .bundle import Bundle
from .engines.onnxruntime import Device, OnnxRuntimeEngine, import_onnxruntime
from .engines.protocol import Engine

EAGER = ("text_encoder", "unet", "vae_decoder")  # what every picture needs; the rest is loaded when first asked for


class Components:
    """Engines by component name and graph form; loading is thread-safe, `close` releases all of them."""

    def __init__(self, bundle: Bundle, device: Device) -> None:
        self._bundle, self._device = bundle, device
        self._engines: dict[tuple[str, str], Engine] = {}
        self._lock = threading.Lock()

    def preload(self, names: Iterable[str] = EAGER) -> None:
        """Load several components at once, each on a thread of its own."""
        import_onnxruntime()  # once, before the threads race for it
        with ThreadPoolExecutor() as pool:
            for future in [pool.submit(self.engine, name) for name in names]:
                future.result()

    def engine(self, name: str, form: str = "plain") -> Engine:
        """The engine of a component in one of its graph forms.  BundleError or EngineError say why there is none."""
        with self._lock:
            known = self._engines.get((name, form))
        if known is not None:
            return known
        loaded = self._load(name, form)
        with self._lock:
            return self._engines.setdefault((name, form), loaded)

    def _load(self, name: str, form: str) -> Engine:
        component = self._bundle.component(name)
        graph = component.graph(form)
        weights = [] if component.weights is None else [component.weights]
        self._bundle.verify(weights)
        return OnnxRuntimeEngine(
            self._bundle.read(graph.path),
            self._bundle.path(graph.path).parent,
            graph.inputs,
            graph.outputs,
            device=self._device,
            weights_size=sum(self._bundle.manifest.files[name].size for name in weights),
        )

    def close(self) -> None:
        with self._lock:
            for engine in self._engines.values():
                engine.close()
            self._engines.clear()
