"""A VAE whose values outgrow float16 is found out at export, and keeps float32 where it must: never a black picture."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from sd_export.graphs.overflow import HEADROOM, float32_values, peaks, require_finite
from sd_export.graphs.precision import LARGEST, to_float16
from sd_export.graphs.weights import save
from sd_export.networks.probes import latent_probes, picture_probes
from sd_runtime.errors import ExportError
from sd_runtime.tensor import Array

SCALING_FACTOR = 0.18215
FACTOR = 40000.0  # on the demo decoder's values, which reach about 10 in that block


def decoder(bundle: Path, factor: float = 1.0) -> ir.Model:
    """The demo decoder; in one block the first convolution gains `factor`, which the normalisation after it takes out
    again, and so does the last, which adds to the picture's own path."""
    with tempfile.TemporaryDirectory() as place:  # onnx_ir reads no hard links, which other tests make to this bundle
        copy = Path(shutil.copytree(bundle / "vae_decoder", Path(place, "vae_decoder")))
        model = ir.external_data.load_to_model(ir.load(copy / "model.onnx"))
    for name in ("decoder.mid_block.resnets.1.conv1", "decoder.mid_block.resnets.1.conv2"):
        for key in (f"{name}.weight", f"{name}.bias"):
            value = model.graph.initializers[key]
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=key)
    return model


def run(path: Path, latents: Array) -> Array:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    sample: Array = session.run(None, {"latent_sample": latents})[0]
    return sample


def export(model: ir.Model, folder: Path, keep: frozenset[str]) -> Path:
    folder.mkdir()
    to_float16(model, keep)
    save(model, folder / "model.onnx", folder / "model.safetensors")
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    return folder / "model.onnx"


def test_a_tame_network_needs_nothing(demo_bundle: Path) -> None:
    assert not float32_values(decoder(demo_bundle), latent_probes(4, SCALING_FACTOR))
    encoder = ir.load(demo_bundle / "vae_encoder" / "model.onnx")
    assert not float32_values(encoder, picture_probes(8))


def test_without_probes_nothing_is_run(demo_bundle: Path) -> None:
    assert float32_values(ir.load(demo_bundle / "unet" / "model.onnx"), []) == frozenset()


def test_a_network_that_overflows_keeps_float32_where_it_must(demo_bundle: Path, tmp_path: Path) -> None:
    probes = latent_probes(4, SCALING_FACTOR)
    wild = decoder(demo_bundle, FACTOR)
    keep = float32_values(wild, probes)
    assert {"decoder.mid_block.resnets.1.conv1/Conv", "decoder.mid_block.resnets.1/Add"} <= keep
    assert not any("Normalization" in name or "mid_block.resnets.0" in name for name in keep)
    (tmp_path / "single").mkdir()
    save(decoder(demo_bundle, FACTOR), tmp_path / "single" / "model.onnx", tmp_path / "single" / "model.safetensors")
    expected = run(tmp_path / "single" / "model.onnx", probes[0])

    naive = export(decoder(demo_bundle, FACTOR), tmp_path / "naive", frozenset())
    where = r"naive overflows float16 at decoder\.mid_block\.resnets\.1\.conv1/Conv; export with --precision fp32"
    with pytest.raises(ExportError, match=where):
        require_finite(naive, probes)

    mixed = export(wild, tmp_path / "mixed", keep)
    require_finite(mixed, probes)
    got = run(mixed, probes[0])
    assert np.abs(got - expected).max() < 0.02 * np.abs(expected).max()
    types = [tensor.data_type for tensor in onnx.load(mixed, load_external_data=False).graph.initializer]
    assert types.count(onnx.TensorProto.FLOAT16) > types.count(onnx.TensorProto.FLOAT)


def test_scores_of_attention_count_for_the_attention(demo_bundle: Path) -> None:
    """They are inside the operator, which float16 runtimes take apart again."""
    model = decoder(demo_bundle)
    weight = model.graph.initializers["decoder.mid_block.attentions.0.to_q.weight.T"]
    assert weight.const_value is not None
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(8000), name=weight.name)
    probes = latent_probes(4, SCALING_FACTOR)
    reached = peaks(model, probes)
    assert reached["decoder.mid_block.attentions.0/Attention/scores"] > LARGEST / HEADROOM
    assert "decoder.mid_block.attentions.0/Attention" in float32_values(model, probes)
    assert any(node.op_type == "Attention" for node in model.graph)
