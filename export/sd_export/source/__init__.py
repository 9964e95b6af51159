"""MODEL → a checkpoint on disk, pinned and hashed; and its networks as torch modules.

    resolve_checkpoint("demo" | folder | file.safetensors | "owner/name")  →  Checkpoint
    load_text_encoder(checkpoint), load_unet(checkpoint), load_vae(checkpoint)  →  torch modules, float32, eval

Nothing here imports torch, diffusers or the hub client before it is needed, and nothing opens a pickle.
"""

from .checkpoint import Checkpoint
from .load import load_text_encoder, load_unet, load_vae
from .resolve import resolve_checkpoint

__all__ = ["Checkpoint", "load_text_encoder", "load_unet", "load_vae", "resolve_checkpoint"]
