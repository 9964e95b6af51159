"""Pickles: refused, with the command that converts them; converted by a process that loads nothing but weights."""

from __future__ import annotations

import gc
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from compvis import State, to_single_file
from sd_export.networks.unet import load_unet
from sd_export.networks.vae import load_vae
from sd_export.source import resolve_checkpoint
from sd_runtime.errors import ExportError


@pytest.fixture(scope="module")
def state(tiny) -> State:
    return to_single_file(tiny.text_encoder, tiny.unet, tiny.vae)


def test_a_refusal_says_the_exact_command(state, tmp_path) -> None:
    path = tmp_path / "my model.ckpt"
    torch.save({"state_dict": state}, path)
    with pytest.raises(ExportError) as caught:
        resolve_checkpoint(str(path))
    assert f"sd-export --model '{path}' --allow-pickle" in str(caught.value)


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_single_file_is_converted(tiny, state, tmp_path, wrapped) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": state, "global_step": 7} if wrapped else state, path)
    checkpoint = resolve_checkpoint(str(path), allow_pickle=True)
    assert (checkpoint.name, list(checkpoint.files)) == ("model", ["model.ckpt"])
    loaded = load_unet(checkpoint).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tiny.unet.state_dict().items())
    converted = checkpoint.weights["unet"][0]
    assert converted.is_file()
    del checkpoint, loaded
    gc.collect()
    assert not converted.exists()  # it goes with the checkpoint


def test_a_folder_of_bin_files_is_converted(tiny, folder) -> None:
    for network, stem in {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}.items():
        (folder / network / f"{stem}.safetensors").unlink()
        torch.save(getattr(tiny, network).state_dict(), folder / network / f"{stem}.bin")
    (folder / "text_encoder/model.safetensors").unlink()
    torch.save(tiny.text_encoder.state_dict(), folder / "text_encoder/pytorch_model.bin")
    with pytest.raises(ExportError, match=r"is a pickle.*--allow-pickle"):
        resolve_checkpoint(str(folder))
    checkpoint = resolve_checkpoint(str(folder), allow_pickle=True)
    assert "text_encoder/pytorch_model.bin" in checkpoint.files
    loaded, expected = load_vae(checkpoint).state_dict(), tiny.vae.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.place),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_fault_11_code_in_a_pickle_never_runs(state, tmp_path, protocol) -> None:
    path, canary = tmp_path / "model.ckpt", tmp_path / "canary"
    torch.save({"state_dict": {"w": torch.ones(1)}, "more": Canary(canary)}, path, pickle_protocol=protocol)
    for allowed in (False, True):
        refused = "holds more than weights|not written as torch" if allowed else "is a pickle"
        with pytest.raises(ExportError, match=refused):
            resolve_checkpoint(str(path), allow_pickle=allowed)
    path.write_bytes(pickle.dumps(Canary(canary), protocol=protocol))
    with pytest.raises(ExportError):
        resolve_checkpoint(str(path), allow_pickle=True)
    assert not canary.exists()


def test_fault_11_modules_in_the_current_folder_are_not_imported(state, tmp_path, monkeypatch) -> None:
    """A checkpoint is often converted where it was unpacked, and a torch.py may lie beside it."""
    canary = tmp_path / "canary"
    for name in ("torch.py", "safetensors.py", "re.py"):
        (tmp_path / name).write_text(f"import os; os.mkdir({str(canary)!r})")
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    monkeypatch.chdir(tmp_path)
    checkpoint = resolve_checkpoint("model.ckpt", allow_pickle=True)
    assert checkpoint.weights["unet"][0].is_file() and not canary.exists()


def test_a_zip_that_expands_is_refused(tmp_path) -> None:
    path = tmp_path / "model.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(ExportError, match=r"its entries are compressed"):
        resolve_checkpoint(str(path), allow_pickle=True)


@pytest.mark.parametrize("content", [b"x", b"", b"PK\3\4 and nothing", b"\x80\x02N."])
def test_what_is_no_pickle_of_weights_is_named(tmp_path, content) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"model\.bin") as caught:
        resolve_checkpoint(str(path), allow_pickle=True)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value) and "more than weights" not in str(caught.value)
