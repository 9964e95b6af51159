"""MODEL → a checkpoint on disk, pinned and hashed.

    resolve_checkpoint("demo" | folder | file.safetensors | "owner/name")  →  Checkpoint
    with_vae(checkpoint, MODEL), with_taesd(checkpoint, MODEL)                  →  the same with a part from elsewhere
    families/                                                                   which kinds of checkpoint there are

Nothing here imports torch, diffusers or the hub client before it is needed, and nothing opens a pickle.  The networks
as torch modules are made in `networks`.
"""

from .autoencoder import with_taesd, with_vae
from .checkpoint import Checkpoint
from .resolve import resolve_checkpoint

__all__ = ["Checkpoint", "resolve_checkpoint", "with_taesd", "with_vae"]
