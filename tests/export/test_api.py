"""What `sd_export` offers to Python, and the lists from which networks and families are found."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import sd_export
from fresh_interpreter import modules_after
from sd_export.networks import base, export, loading, probes, registry
from sd_export.source import families
from sd_export.tensorrt_ import build as build_module
from sd_export.tensorrt_.plan import BuildOptions
from sd_runtime.bundle.catalogue import CATALOGUE

SHARED = {Path(module.__file__ or "").stem for module in (base, export, loading, probes, registry)}


def test_importing_the_package_imports_nothing() -> None:
    loaded = modules_after("import sd_export")
    assert {name for name in loaded if name.startswith(("sd_export", "sd_runtime"))} == {"sd_export"}
    loaded = modules_after("from sd_export import BuildOptions, ExportOptions, build, export")
    assert not {"torch", "diffusers", "transformers", "onnx", "onnx_ir", "tensorrt", "onnxruntime"} & loaded


def test_functions_and_modules_do_not_share_a_name() -> None:
    """A submodule that is imported becomes an attribute of its package, and would hide a function."""
    assert inspect.isfunction(sd_export.export) and inspect.isfunction(sd_export.build)
    assert sd_export.build is build_module.build and sd_export.BuildOptions is BuildOptions
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        sd_export.nothing  # noqa: B018


@pytest.mark.parametrize("name", ["export", "build"])
def test_all_names_what_a_signature_shows(name: str) -> None:
    """Our own types; `Path` and the like are Python's."""
    assert set(sd_export.__all__) <= set(dir(sd_export))
    signature = inspect.signature(getattr(sd_export, name))
    shown = {str(parameter.annotation) for parameter in signature.parameters.values()} - {"bool"}
    assert shown == {f"{name.capitalize()}Options"} and shown <= set(sd_export.__all__)
    for options in shown:
        for field in inspect.signature(getattr(sd_export, options)).parameters.values():
            ours = [word for word in str(field.annotation).split(" | ") if word[0].isupper() and word != "Path"]
            assert set(ours) - {"None"} <= set(sd_export.__all__)


def test_every_network_s_file_is_in_the_registry() -> None:
    files = {path.stem for path in Path(registry.__file__).parent.glob("[!_]*.py")} - SHARED
    assert {entry.module.partition(":")[0] for entry in registry.REGISTRY} == files
    for entry in registry.REGISTRY:
        assert isinstance(entry.network(), base.Network)
        assert entry.name in CATALOGUE  # the runtime's list


def test_every_family_s_file_is_in_the_list() -> None:
    files = {path.stem for path in Path(families.__file__).parent.glob("[!_]*.py")} - {"base", "check", "refused"}
    assert {id(getattr(families, name).FAMILY) for name in files} == {id(family) for family in families.FAMILIES}


@pytest.mark.parametrize(
    ("name", "width", "embedding", "phrase"),
    [
        ("model", 768, None, "Stable Diffusion 1.x"),
        ("model", 1024, None, "Stable Diffusion 2.x"),
        ("sd-turbo", 1024, None, "SD-Turbo"),
        ("model", 768, 256, "LCM (latent consistency model)"),
        ("model", 64, None, "Stable Diffusion of its own size"),
    ],
)
def test_families_are_recognised(name: str, width: int, embedding: int | None, phrase: str) -> None:
    unet = {"time_cond_proj_dim": embedding}
    configs = {"text_encoder": {"hidden_size": width}, "unet": unet, "scheduler": {"_class_name": "PNDMScheduler"}}
    assert families.recognise(name, configs).phrase == phrase
