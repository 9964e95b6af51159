"""The files that make a bundle a folder in diffusers layout, which optimum opens, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .networks.registry import PART
from .source import Checkpoint
from .source.checkpoint import FEATURE_EXTRACTOR, SAFETY_CHECKER

SCHEDULER = "scheduler/scheduler_config.json"


def write_configs(checkpoint: Checkpoint, components: tuple[str, ...], folder: Path) -> None:
    """The files that make the bundle a diffusers folder: model_index.json, each config.json, scheduler, tokenizer."""
    checked = SAFETY_CHECKER in components
    others = {  # optimum would load a safety checker with torch, and needs none
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "feature_extractor": ["transformers", "CLIPImageProcessor"] if checked else [None, None],
        "image_encoder": [None, None],
        "_class_name": checkpoint.family.pipelines[0],
    }
    _write_json(folder / "model_index.json", dict(checkpoint.model_index) | others)
    _write_json(folder / SCHEDULER, checkpoint.configs["scheduler"])
    if checked:
        _write_json(folder / FEATURE_EXTRACTOR / "preprocessor_config.json", checkpoint.configs[FEATURE_EXTRACTOR])
    for name in components:
        _write_json(folder / name / "config.json", checkpoint.configs[PART[name]])
    (folder / "tokenizer").mkdir()
    for name, content in checkpoint.tokenizer.items():
        (folder / "tokenizer" / name).write_bytes(content)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """A config as it is written: the same value, the same bytes."""
    kept = {key: item for key, item in value.items() if key != "_name_or_path"}  # it may be a path of some machine
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()
