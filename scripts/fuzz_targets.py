"""What reads foreign bytes and text, one target each: how its inputs are made, and what reads them.

The property is the same for all: a value, or an SDError in one line; never another exception, in bounded time.
tests/unit/test_fuzz.py runs each for a moment, scripts/fuzz for as long as one likes.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sd_runtime.adapters.textual_inversion import load_textual_inversion
from sd_runtime.bundle.graph_file import WeightsFile, check_graph
from sd_runtime.bundle.manifest import Manifest
from sd_runtime.bundle.safetensors_file import open_safetensors
from sd_runtime.bundle.schema import parse_json
from sd_runtime.cli.recall import recall
from sd_runtime.cli.settings import read_prompts_file
from sd_runtime.errors import SDError
from sd_runtime.images.metadata import Parameters, parse_parameters, png_bytes, read_parameters
from sd_runtime.prompt import Tokenizer, tokenize_prompts
from sd_runtime.request import Defaults
from sd_runtime.sampling import SchedulerConfig, make_plan

REPOSITORY = Path(__file__).resolve().parents[1]
BUNDLE = REPOSITORY / "tests/data/bundle-0.1.0.tar.xz"
DEMO = REPOSITORY / "export/sd_export/demo_checkpoint"
PICTURE = REPOSITORY / "tests/data/picture-0.1.0.png"

HOSTILE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    -(2**63),
    10**400,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    "",
    " ",
    "0",
    "../../x",
    "/etc/passwd",
    "\x00",
    "\x1b[31m",
    "a\nb",
    "\ud800",
    "\u202e",
    "x" * 5000,
    [],
    {},
    [[]],
    [None] * 50,
    {"": {}},
    "None",
    [1, "a"],
)
WORDS = (
    "(",
    ")",
    "[",
    "]",
    ":",
    "|",
    "\\",
    "<lora:",
    ">",
    "BREAK",
    " AND ",
    "1.3)",
    ":1e9)",
    "((((",
    "]]]]",
    "<|endoftext|>",
    "__a__",
    "é",
    "\U0001f9d1\u200d",
    "\u0301" * 9,
    "\r\n",
    "\t",
    '"',
    "'s",
    "{",
    "}",
    "Steps: 1",
    "Negative prompt: ",
    ", ",
    "Size: 8x8",
)
TEXT = st.lists(st.sampled_from(WORDS) | st.text(max_size=12), max_size=14).map("".join)


@st.composite
def edited(draw: DrawFn, seeds: Sequence[bytes]) -> bytes:
    """One of the seeds after up to six edits, or bytes of any kind."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(data)))
        end = min(at + draw(st.sampled_from((0, 1, 4, 8, 100, 10**6))), len(data))
        kind = draw(st.integers(0, 3))
        new = draw(st.binary(max_size=16)) if kind else bytes(data[at:end]) * draw(st.integers(0, 3))
        data[at : end if kind != 1 else at] = new
    return bytes(data)


@st.composite
def edited_json(draw: DrawFn, seeds: Sequence[Any]) -> bytes:
    """One of the seeds with hostile values in up to four places, as JSON."""
    value = json.loads(json.dumps(draw(st.sampled_from(seeds))))
    for _ in range(draw(st.integers(0, 4))):
        holder, key = value, None
        while isinstance(holder, (dict, list)) and holder:
            key = draw(st.sampled_from(sorted(holder) if isinstance(holder, dict) else range(len(holder))))
            child = holder[key]
            if not (isinstance(child, (dict, list)) and child) or draw(st.integers(0, 3)) == 0:
                break
            holder = child
        if key is None or not isinstance(holder, (dict, list)):
            break
        action = draw(st.integers(0, 3))
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[draw(st.text(max_size=5))] = deepcopy(draw(st.sampled_from(HOSTILE)))
        else:
            holder[key] = deepcopy(draw(st.sampled_from(HOSTILE)))
    return json.dumps(value).encode()


@cache
def _members() -> dict[str, bytes]:
    """The files of a bundle, small ones only."""
    with tarfile.open(BUNDLE) as archive:
        found = {m.name.partition("/")[2]: archive.extractfile(m) for m in archive if m.isfile() and m.size < 1 << 19}
        return {name: file.read() for name, file in found.items() if file is not None}


def _graphs() -> list[bytes]:
    return [data for name, data in _members().items() if name.endswith(".onnx")]


def _tokenizer() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (DEMO / "tokenizer").iterdir()}


def _safetensors(tensors: dict[str, tuple[str, list[int], int]]) -> bytes:
    """A file with these (dtype, shape, bytes), all zeros."""
    header, offset = dict[str, Any](), 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(offset)


WEIGHTS = [
    _safetensors({"emb_params": ("F32", [2, 8], 64)}),
    _safetensors({"<cat>": ("F16", [8], 16), "b": ("BF16", [2, 2], 8), "c": ("I64", [], 8)}),
]
SETTINGS = Parameters(
    prompt="a (red:1.2) star", negative_prompt="b", seed=7, num_inference_steps=20, width=64, height=64
)
FOREIGN = (
    {
        "sui_image_params": {
            "prompt": "a",
            "seed": 1,
            "steps": 2,
            "cfgscale": 3,
            "width": 64,
            "height": 64,
            "sampler": "euler",
        }
    },
    {"prompt": "a", "full_prompt": ["a"], "resolution": "(64, 64)", "seed": "1", "version": "Fooocus v2.5", "steps": 3},
    {
        "3": {
            "class_type": "KSampler",
            "inputs": {"seed": 1, "steps": 2, "cfg": 3, "sampler_name": "euler", "positive": ["6", 0]},
        },
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a star", "clip": ["4", 1]}},
    },
)
LINES = (
    {"prompt": "a", "num_inference_steps": 3, "grid": "1x2", "seed": 4, "guidance_scale": 1.5, "scheduler": "ddim"},
)


def _picture(texts: tuple[str, bytes]) -> bytes:
    """A PNG that says this under this keyword."""
    out, info = io.BytesIO(), PngInfo()
    info.add(b"tEXt", texts[0].encode("latin-1") + b"\0" + texts[1])
    Image.new("RGB", (8, 8)).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def _read_manifest(data: bytes, folder: Path) -> object:
    return Manifest.from_bytes(data)


def _read_graph(data: bytes, folder: Path) -> object:
    check_graph("unet/model.onnx", data, WeightsFile("model.safetensors", 1 << 20))
    return None


def _read_tokenizer(files: dict[str, bytes], folder: Path) -> object:
    return Tokenizer.from_bytes(files).encode("a large red star, naïve 1st")


@cache
def _demo_tokenizer() -> Tokenizer:
    return Tokenizer.from_bytes(_tokenizer())


def _read_prompt(prompt: str, folder: Path) -> object:
    return tokenize_prompts(_demo_tokenizer(), [prompt], [""], weighting=True, most_chunks=16)


def _in_file(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    def written(data: bytes, folder: Path) -> object:
        path = folder / name
        path.write_bytes(data)
        return read(path)

    return written


def _read_picture(path: Path) -> object:
    return recall(read_parameters(path))


def _read_parameters(text: str, folder: Path) -> object:
    return recall(parse_parameters(text))


def _read_scheduler(data: bytes, folder: Path) -> object:
    return make_plan(SchedulerConfig.from_bytes(data), 7)


def _read_prompts(path: Path) -> object:
    defaults = Defaults(3, 2.0, 64, 64)
    return [settings.request(defaults) for _, settings in read_prompts_file(path) if settings.prompt is not None]


@st.composite
def _tokenizer_files(draw: DrawFn) -> dict[str, bytes]:
    """A tokenizer's files, one or two of them spoilt or gone."""
    files = _tokenizer()
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(files)))
        if draw(st.integers(0, 4)) == 0 and len(files) > 1:
            del files[name]
        elif name.endswith(".json") and draw(st.booleans()):
            files[name] = draw(edited_json([json.loads(_tokenizer()[name])]))
        else:
            files[name] = draw(edited([files[name]]))
    return files


def _schedulers() -> list[Any]:
    own = json.loads((DEMO / "scheduler/scheduler_config.json").read_bytes())
    names = (
        "DDIMScheduler",
        "EulerDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "LCMScheduler",
    )
    switches = {
        "use_karras_sigmas": True,
        "timestep_spacing": "trailing",
        "final_sigmas_type": "zero",
        "solver_order": 2,
    }
    return [own, *({**own, "_class_name": name, **switches} for name in names)]


@dataclass(frozen=True)
class Target:
    """`inputs`: a strategy, made when it is first needed; `read`: what reads one, with an empty folder to write to."""

    name: str
    inputs: Callable[[], SearchStrategy[Any]]
    read: Callable[[Any, Path], object]

    def check(self, value: Any, folder: Path) -> None:
        """Raises whatever is not an SDError in one line."""
        try:
            self.read(value, folder)
        except SDError as error:
            assert str(error).isprintable(), repr(str(error))


TARGETS = {
    target.name: target
    for target in (
        Target("manifest", lambda: edited_json([json.loads(_members()["manifest.json"])]), _read_manifest),
        Target("manifest bytes", lambda: edited([_members()["manifest.json"]]), _read_manifest),
        Target("graph", lambda: edited(_graphs()) | st.binary(max_size=200), _read_graph),
        Target("tokenizer", _tokenizer_files, _read_tokenizer),
        Target("prompt", lambda: TEXT, _read_prompt),
        Target(
            "safetensors", lambda: edited(WEIGHTS), _in_file("x.safetensors", lambda p: [*open_safetensors(p).items()])
        ),
        Target("textual inversion", lambda: edited(WEIGHTS), _in_file("x.safetensors", load_textual_inversion)),
        Target(
            "picture",
            lambda: edited([PICTURE.read_bytes(), png_bytes(Image.new("RGB", (8, 8)), SETTINGS)]),
            _in_file("x.png", _read_picture),
        ),
        Target(
            "picture of others",
            lambda: st.tuples(
                st.sampled_from(("parameters", "prompt", "workflow", "Comment")),
                edited_json(FOREIGN) | TEXT.map(lambda text: text.encode("utf-8", "replace")),
            ).map(_picture),
            _in_file("x.png", _read_picture),
        ),
        Target("parameters", lambda: TEXT, _read_parameters),
        Target(
            "prompts file",
            lambda: st.lists(
                edited_json(LINES) | TEXT.map(lambda text: text.encode("utf-8", "replace")), max_size=4
            ).map(b"\n".join),
            _in_file("x.txt", _read_prompts),
        ),
        Target("scheduler", lambda: edited_json(_schedulers()), _read_scheduler),
        Target("json", lambda: st.binary(max_size=80), lambda data, folder: parse_json(data, "x.json")),
    )
}


def named(names: Iterable[str]) -> list[Target]:
    """KeyError: there is no such target."""
    return [TARGETS[name] for name in names] or list(TARGETS.values())
