"""The bundle's README.md: a model card, as the hub reads it, and what each file is for people.

It is not in the manifest's list of files: people edit model cards, and a bundle with an edited one is no other bundle.
No times and no machine's paths are in it, so the same checkpoint gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from sd_runtime.bundle.manifest import Manifest, Verification
from sd_runtime.errors import one_line

from .source import Checkpoint
from .source.checkpoint import SAFETY_CHECKER

CARD = "README.md"
TAGS = ("stable-diffusion", "text-to-image", "onnx", "sd-lean")
FOLDERS = {
    "text_encoder": "the prompt's words to hidden states",
    "unet": "the denoiser",
    "vae_decoder": "latents to pictures",
    "vae_encoder": "pictures to latents, for image to image",
    "safety_checker": "withholds pictures that it takes for unsafe",
    "taesd": "a small decoder, quicker and less exact",
    "sampler_step": "guidance and a step of the sampler, on a GPU",
    "pixels": "the decoder's samples to the bytes of a picture, on a GPU",
    "tokenizer": "vocabulary and merges",
    "scheduler": "the training schedule and the model's own sampler",
    "feature_extractor": "how the safety checker sees pictures",
    "reference": "tensors that `sd-verify` compares with where the checkpoint is not at hand",
    "engines": "TensorRT engines, each for the GPUs that it was built for",
}
MEASURES = {
    "relative": "relative error at most {:g}",
    "max_abs": "difference at most {:g}",
    "psnr": "at least {:g} dB",
}
UNFILTERED = """
## Safety checker

`sd-run` and `Pipeline` run the safety checker of this model unless they are told not to. **optimum and diffusers draw
this bundle without it**: model_index.json names none, because they would load it with torch. Whoever serves pictures
with them has to check the pictures.
"""


def make_card(manifest: Manifest, checkpoint: Checkpoint, license_name: str | None = None) -> str:
    """The text for a bundle with this manifest; `license_name`: as the checkpoint's own card gives it."""
    front = {"pipeline_tag": "text-to-image", "library_name": "sd-lean", "tags": list(TAGS), "inference": False}
    if checkpoint.revision is not None:
        front["base_model"] = checkpoint.id
    if license_name is not None:
        front["license"] = license_name
    header = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items())
    unfiltered = UNFILTERED if SAFETY_CHECKER in manifest.components else ""
    return f"---\n{header}\n---\n{''.join(_body(manifest, checkpoint))}{unfiltered}"


def _body(manifest: Manifest, checkpoint: Checkpoint) -> Iterator[str]:
    name, source = one_line(manifest.name), manifest.source
    revision = "" if source.revision is None else f", revision `{source.revision}`"
    defaults = manifest.defaults
    yield f"\n# {name}\n\n{checkpoint.family.phrase}, exported by sd-lean {manifest.exporter.get('sd-lean', '')} from "
    yield f"`{one_line(source.id)}`{revision}, in {manifest.precision}. Weights keep the licence of that model.\n"
    for part, own in sorted(manifest.parts.items()):
        yield f"Its {part} is `{one_line(own.id)}`'s.\n"
    yield f"\nUsual settings: {defaults.num_inference_steps} steps, guidance scale {defaults.guidance_scale:g}, "
    yield f"{defaults.width}×{defaults.height} pixels.\n"
    yield '\n## Draw\n\nWith this folder as the current one, and `pip install "sd-lean[cpu]"` (no torch):\n\n```sh\n'
    yield 'sd-run "a lighthouse at dusk" --model . --seed 7 --output lighthouse.png\n```\n\n```python\n'
    yield 'from sd_runtime import Pipeline\n\nwith Pipeline.load(".") as pipe:\n'
    yield '    pipe("a lighthouse at dusk", seed=7).images[0].save("lighthouse.png")\n```\n\n'
    yield 'optimum reads it, too: `ORTStableDiffusionPipeline.from_pretrained(".")`, or the class that '
    yield "model_index.json names.\n\n## Files\n\n| folder | what | files | MB |\n|---|---|---|---|\n"
    for folder, sizes in sorted(_folders(manifest).items()):
        what = FOLDERS.get(folder, "")
        yield f"| `{one_line(folder)}` | {what} | {len(sizes)} | {sum(sizes) / 1e6:.1f} |\n"
    yield "\nmanifest.json has the SHA-256 of each of them.\n\n## Compared with the checkpoint\n\n"
    yield from _parity(manifest.verification)


def _folders(manifest: Manifest) -> Mapping[str, list[int]]:
    """Folder → the sizes of its files in bytes."""
    found: dict[str, list[int]] = {}
    for name, record in manifest.files.items():
        if "/" in name:
            found.setdefault(name.partition("/")[0], []).append(record.size)
    return found


def _parity(verification: Verification | None) -> Iterator[str]:
    if verification is None or verification.skipped:
        yield "The export did not compare it (`--no-verify`); `sd-verify` does.\n"
        return
    yield "The export computed each of these with torch and with this bundle; all were within their limits. "
    yield "`sd-verify .` measures them again.\n\n| network | output | limit |\n|---|---|---|\n"
    for check in verification.checks:
        yield f"| {check.component} | {check.name} | {MEASURES[check.measure].format(check.limit)} |\n"


def read_license(folder: Path) -> str | None:
    """The licence that the card in a checkpoint's folder gives; None: there is no card, or it gives none."""
    card = folder / CARD
    if not card.is_file():
        return None
    with card.open("rb") as file:
        lines = file.read(1 << 16).decode(errors="replace").splitlines()
    front = lines[1 : lines.index("---", 1)] if lines[:1] == ["---"] and "---" in lines[1:] else []
    found = [line.partition(":")[2].strip().strip("\"'") for line in front if line.startswith("license:")]
    return one_line(found[0]) if found and found[0] else None
