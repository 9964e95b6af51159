"""The runtime stays lean: what it never imports, what it imports only when needed, and how little it adds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from fresh_interpreter import HELP, modules_after

NEVER = ("torch", "transformers", "diffusers", "onnx", "tokenizers", "safetensors", "huggingface_hub", "sd_export")
DEPENDENCIES = {"numpy", "PIL", "platformdirs", "tqdm", "onnxruntime", "sd_runtime"}
PACKAGE = Path(__file__).parents[2] / "runtime/sd_runtime"
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)


def foreign(modules: set[str]) -> set[str]:
    """Top-level packages that are neither Python's own nor dependencies of ours."""
    tops = {name.partition(".")[0] for name in modules}
    return {top for top in tops - DEPENDENCIES - sys.stdlib_module_names if not top.startswith("_")}


def test_no_module_imports_more_than_the_dependencies() -> None:
    """All modules of the package at once; onnxruntime is absent too, for it is loaded with the first engine."""
    loaded = modules_after("import " + ", ".join(MODULES))
    assert set(MODULES) <= loaded
    assert foreign(loaded) == set()
    assert "onnxruntime" not in loaded


def test_importing_the_package_imports_nothing() -> None:
    ours = {name for name in modules_after("import sd_runtime") if name.startswith("sd_runtime")}
    assert ours == {"sd_runtime", "sd_runtime._version"}
    assert not {"numpy", "PIL", "argparse"} & modules_after("import sd_runtime")


def test_importing_the_pipeline_adds_little_to_numpy_and_pillow() -> None:
    """Counted in modules, since seconds depend on the machine."""
    base = modules_after("import numpy, PIL.Image")
    added = modules_after("from sd_runtime import Pipeline") - base
    standard = {name for name in added if not name.startswith("sd_runtime")}
    assert foreign(added) == set()
    assert len(standard) <= 60, sorted(standard)


@pytest.mark.parametrize("arguments", [["--help"], ["--list-schedulers"], ["--version"]])
def test_help_imports_no_numpy(arguments: list[str]) -> None:
    loaded = modules_after(HELP.format(module="sd_runtime.cli.run", arguments=arguments))
    assert not {"numpy", "PIL", "tqdm", "onnxruntime"} & loaded
    assert foreign(loaded) == set()


def test_export_help_imports_nothing_heavy() -> None:
    loaded = modules_after(HELP.format(module="sd_export.cli", arguments=["--help"]))
    assert not {"torch", "diffusers", "transformers", "onnx"} & loaded


BLOCKED = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {never!r}:
            raise AssertionError(name + " was imported")

sys.meta_path.insert(0, Refuse())
from sd_runtime.cli.run import main
assert main({arguments!r}) == 0
"""


def test_drawing_imports_nothing_heavy(demo_bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    arguments = ["a red star", "--model", str(demo_bundle), "--steps", "2", "--quiet", "--output", str(picture)]
    program = BLOCKED.format(never=NEVER, arguments=arguments)
    loaded = modules_after(program)
    assert picture.stat().st_size > 0
    assert "onnxruntime" in loaded
    assert not set(NEVER) & {name.partition(".")[0] for name in loaded}
