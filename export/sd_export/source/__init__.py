"""MODEL → a checkpoint on disk, pinned and hashed; and its networks as torch modules.

    resolve_checkpoint("demo" | folder | file.safetensors | "owner/name")  →  Checkpoint
    with_vae(checkpoint, MODEL), with_taesd(checkpoint, MODEL)                  →  the same with a part from elsewhere
    load_text_encoder(checkpoint), load_unet(checkpoint), load_vae(checkpoint),
    load_safety_checker(checkpoint), load_taesd(checkpoint)                     →  torch modules, float32, eval

Nothing here imports torch, diffusers or the hub client before it is needed, and nothing opens a pickle.
"""

from .autoencoder import with_taesd, with_vae
from .checkpoint import Checkpoint
from .load import load_safety_checker, load_taesd, load_text_encoder, load_unet, load_vae
from .resolve import resolve_checkpoint

__all__ = [
    "Checkpoint",
    "load_safety_checker",
    "load_taesd",
    "load_text_encoder",
    "load_unet",
    "load_vae",
    "resolve_checkpoint",
    "with_taesd",
    "with_vae",
]
