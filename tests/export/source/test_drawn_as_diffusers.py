"""What says how a checkpoint is drawn, read as diffusers and transformers read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from sd_export.source import resolve_checkpoint, tokenizer
from sd_runtime.prompt import Tokenizer
from sd_runtime.sampling import SchedulerConfig, make_plan
from transformers import CLIPTokenizer


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("named", "written"),
    [
        ("EulerDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"timestep_spacing": "trailing"}),
        ("DDIMScheduler", {"_class_name": "UniPCMultistepScheduler", "solver_order": 3, "clip_sample": False}),
    ],
)
def test_model_index_names_the_sampler(folder: Path, named: str, written: dict[str, Any]) -> None:
    """As people switch a checkpoint's sampler: one line in model_index.json, over a config that another class wrote."""
    edit(folder / "model_index.json", scheduler=["diffusers", named])
    edit(folder / "scheduler/scheduler_config.json", **written)
    reference = DiffusionPipeline.from_pretrained(folder, local_files_only=True).scheduler
    config = SchedulerConfig.from_dict(resolve_checkpoint(str(folder)).configs["scheduler"])
    assert (type(reference).__name__, config.class_name) == (named, named)
    assert config.timestep_spacing == reference.config.timestep_spacing
    reference.set_timesteps(7)
    assert make_plan(config, 7).timesteps.tolist() == pytest.approx(reference.timesteps.tolist())


WORDS = [
    {"<my-cat>": 49408, "Midjourney": 49409},
    {"zwx": 49409, "my own  style": 49408},
    {"<|startoftext|>": 49406, "<|endoftext|>": 49407, "Big Cat": 49408},
]


@pytest.mark.parametrize("words", WORDS)
def test_words_that_were_trained_are_one_token(folder: Path, words: dict[str, int]) -> None:
    (folder / "tokenizer/tokenizer.json").unlink()
    for name, content in tokenizer.clip().items():
        (folder / "tokenizer" / name).write_bytes(content)
    (folder / "tokenizer/added_tokens.json").write_text(json.dumps(words))
    checkpoint = resolve_checkpoint(str(folder))
    reference = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ours = Tokenizer.from_bytes(checkpoint.tokenizer)
    for word in words:
        text = f"a photo of {word} in the snow, {word.lower()}x"
        assert ours.encode(text) == reference(text, add_special_tokens=False).input_ids
    assert "tokenizer/added_tokens.json" in checkpoint.files


@pytest.mark.parametrize(
    ("width", "scheduler", "steps", "guidance_scale"),
    [
        (1024, {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, 1, 0.0),  # SD-Turbo's
        (1024, {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, 50, 7.5),  # 2.1's
        (1024, {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, 50, 7.5),
        (
            1024,  # 2.1 as the paper on schedules without signal (Lin et al. 2023) has it sampled: not distilled
            {
                "_class_name": "EulerDiscreteScheduler",
                "timestep_spacing": "trailing",
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
            },
            50,
            7.5,
        ),
        (768, {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"}, 50, 7.5),
        (768, {"_class_name": "LCMScheduler"}, 4, 1.0),  # LCM-LoRA, merged
        (768, {"_class_name": "TCDScheduler"}, 4, 1.0),
    ],
)
def test_a_distilled_model_is_known_whatever_it_is_called(
    width: int, scheduler: dict[str, Any], steps: int, guidance_scale: float
) -> None:
    from sd_export.source.families import recognise

    family = recognise("renamed", {"text_encoder": {"hidden_size": width}, "unet": {}, "scheduler": scheduler})
    assert (family.steps, family.guidance_scale) == (steps, guidance_scale)
