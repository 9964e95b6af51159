"""Copies of a bundle with engines of a fake TensorRT in them, and what a picture of theirs is compared with."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from fake_tensorrt import fake_plan
from sd_export.tensorrt_.plan import BuildOptions, plan_builds
from sd_runtime.bundle.bundle import Bundle
from sd_runtime.bundle.manifest import MANIFEST, EngineRecord, Manifest, ShapeRange, Target, record_file
from sd_runtime.pipeline import Pipeline
from sd_runtime.result import Result
from tensorrt_rig import whole_range

VERSION = "10.16.0"
HERE = Target("NVIDIA H200", "9.0", VERSION, "13.0", "580.65.6")
BUILT = ("text_encoder", "unet", "vae_decoder", "sampler_step", "pixels")
REQUEST: dict[str, Any] = {
    "prompt": "a large red star on a blue background",
    "seed": 5,
    "num_inference_steps": 6,
    "scheduler": "euler_a",
}


def copy_with_engines(
    source: Path, target: Path, change: Callable[[EngineRecord], EngineRecord | None] = lambda record: record
) -> Path:
    """A copy of a bundle with an engine for every network and loop graph; `change` edits their entries."""
    shutil.copytree(source, target)
    manifest, records = Bundle.open(source).manifest, []
    for name in BUILT:
        graphs = manifest.components[name].graphs
        for form in ("trt-basic",) if "trt-basic" in graphs else tuple(graphs):
            record = add_engine(target, manifest, name, form, whole_range(graphs[form].inputs), f"{name}-{form}")
            changed = change(record)
            records += [] if changed is None else [changed]
    write_engines(target, manifest, records)
    return target


def built_as_planned(source: Path, target: Path, *, guidance_scale: float | None = None, **options: Any) -> Path:
    """A copy of a bundle, its model meant for `guidance_scale` if that is given, with the engines that sd-export build
    makes with these options of `BuildOptions`."""
    shutil.copytree(source, target)
    manifest = Bundle.open(source).manifest
    if guidance_scale is not None:
        manifest = replace(manifest, defaults=replace(manifest.defaults, guidance_scale=guidance_scale))
    builds = plan_builds(manifest, BuildOptions(target, **options), VERSION)
    records = [
        add_engine(target, manifest, planned.component, planned.form, planned.profile, planned.label)
        for planned in builds
    ]
    write_engines(target, manifest, [replace(r, refittable=options.get("refittable", False)) for r in records])
    return target


def add_engine(
    root: Path, manifest: Manifest, name: str, form: str, profile: dict[str, ShapeRange], label: str
) -> EngineRecord:
    component, path = manifest.components[name], f"engines/h200/{label.replace(' ', '-')}.plan"
    graph = component.graphs[form]
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(fake_plan(root / graph.path, profile, tensorrt=VERSION))
    weights = None if component.weights is None else manifest.files[component.weights].digest
    digest = manifest.files[graph.path].digest
    return EngineRecord(name, form, path, "fp32", profile, HERE, digest, weights, False, 4096)


def write_engines(root: Path, manifest: Manifest, records: Sequence[EngineRecord]) -> None:
    files = manifest.files | {record.path: record_file(root / record.path) for record in records}
    (root / MANIFEST).write_bytes(replace(manifest, engines=tuple(records), files=files).to_bytes())


@cache
def on_cpu(bundle: Path, **changed: Any) -> Result:
    with Pipeline.load(bundle, device="cpu") as pipeline:
        return pipeline(**(REQUEST | changed))


def assert_same_pictures(result: Result, expected: Result) -> None:
    assert np.abs(result.latents - expected.latents).max() < 1e-3
    for picture, other in zip(result.images, expected.images, strict=True):
        assert np.abs(np.asarray(picture, int) - np.asarray(other, int)).max() <= 1
