"""The text encoder from token embeddings on: the same numbers as from token ids, over the same weights file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors import safe_open
from sd_export.graphs.forms import text_embeds
from sd_export.graphs.weights import save_graph
from sd_export.networks.text_encoder import text_embeds_signature
from sd_export.signature import Sizes

TABLE = "text_model.embeddings.token_embedding.weight"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_embeddings_of_the_ids_give_the_same_states(traced: Callable[..., Any], precision: str, tmp_path: Path) -> None:
    network = traced("text_encoder", precision)
    feeds = network.feeds({"batch": 3})
    with safe_open(str(network.weights), framework="numpy") as file:
        embeddings = file.get_tensor(TABLE)[feeds["input_ids"]].astype(np.float32)
    shutil.copy(network.weights, tmp_path)
    graph = tmp_path / "model_embeds.onnx"
    save_graph(text_embeds(network.graph, text_embeds_signature(Sizes(4, 8, 16, 77, 24))), graph)
    onnx.checker.check_model(str(graph), full_check=True)

    content = onnx.load(graph, load_external_data=False).graph
    assert [value.name for value in content.input] == ["inputs_embeds"]
    assert [value.name for value in content.output] == ["last_hidden_state"]
    assert TABLE not in {initializer.name for initializer in content.initializer}
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    (states,) = session.run(None, {"inputs_embeds": embeddings})
    np.testing.assert_array_equal(states, network.run(feeds)["last_hidden_state"])
