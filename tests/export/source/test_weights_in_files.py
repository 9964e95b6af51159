"""What a checkpoint's weight files may hold, and what is refused by the tensor's name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file
from sd_export.graphs.precision import to_float16
from sd_export.networks.text_encoder import load_text_encoder
from sd_export.networks.unet import load_unet
from sd_export.networks.vae import load_vae
from sd_export.source import resolve_checkpoint
from sd_runtime.errors import ExportError
from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection

TEXT, UNET = "text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_number_that_is_none_is_named(folder: Path, number: float, dtype: torch.dtype) -> None:
    """In the last row of the vocabulary, which no check encodes, and in a bias too small to leave the graph."""
    for name, load, key in (
        (TEXT, load_text_encoder, "embeddings.token_embedding.weight"),
        (VAE, load_vae, "decoder.conv_out.bias"),
    ):
        state = {tensor: content.to(dtype) for tensor, content in load_file(folder / name).items()}
        full = next(tensor for tensor in state if tensor.endswith(key))
        state[full][-1] = number
        save_file(state, folder / name)
        with pytest.raises(ExportError, match=rf"tensor \S*{key} of the \w+ holds NaN or infinity"):
            load(resolve_checkpoint(str(folder)))
    assert load_unet(resolve_checkpoint(str(folder))) is not None


@pytest.mark.parametrize("number", [-70000.0, 70000.0, float("nan")])
def test_a_weight_beyond_float16_is_named(number: float) -> None:
    weight = ir.val("layer.weight", const_value=ir.tensor(np.array([[1.0, number]], np.float32), name="layer.weight"))
    x = ir.val("x", ir.DataType.FLOAT, [1, 1])
    y = ir.node("MatMul", [x, weight], name="product")
    y.outputs[0].name, y.outputs[0].dtype, y.outputs[0].shape = "y", ir.DataType.FLOAT, ir.Shape([1, 2])
    graph = ir.Graph([x], y.outputs, nodes=[y], initializers=[weight], opset_imports={"": 23})
    to_float16(ir.Model(graph, ir_version=10))
    with pytest.raises(ExportError, match=r"weight layer\.weight exceeds float16.*--precision fp32"):
        assert weight.const_value is not None
        weight.const_value.numpy()


def test_all_of_clip_as_a_text_encoder(tiny, folder: Path) -> None:
    """As some tools saved it: transformers' CLIPTextModel takes its half of it."""
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    text = tiny.text_encoder.config.to_dict()
    whole = CLIPModel(CLIPConfig(text_config=text, vision_config=vision | {"image_size": 30, "patch_size": 6}))
    state = load_file(folder / TEXT)
    start = "text_model." if not any(name.startswith("text_model.") for name in state) else ""
    extra = {name: tensor for name, tensor in whole.state_dict().items() if not name.startswith("text_model.")}
    assert {"logit_scale", "text_projection.weight", "visual_projection.weight"} <= extra.keys()
    save_file({start + name: tensor for name, tensor in state.items()} | extra, folder / TEXT)
    loaded, expected = load_text_encoder(resolve_checkpoint(str(folder))).state_dict(), tiny.text_encoder.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_text_encoder_with_its_projection(tiny, folder: Path) -> None:
    projected = CLIPTextModelWithProjection(tiny.text_encoder.config)
    projected.save_pretrained(folder / "text_encoder")
    loaded = load_text_encoder(resolve_checkpoint(str(folder)))
    ids = torch.tensor([[49406, 1929, 530, 7223, 7235, *[49407] * 72]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).last_hidden_state, projected.eval()(ids).last_hidden_state)
