"""RAFT by torchvision, loaded from the published names, against the original network's flows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden import load
from recipe import fill

from qvsr.models.flow import load_raft

CLOSE = 1e-3  # pixels; stated in the set


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    meta, tensors = load("eval_raft")
    path: Path = tmp_path_factory.mktemp("raft") / "raft-things.pth"
    torch.save({f"module.{key}": value for key, value in fill(meta["recipe"], tensors).items()}, path)  # as released checkpoints are
    return load_raft(path)


def test_flows_of_the_original_network(network: torch.nn.Module) -> None:
    meta, tensors = load("eval_raft")
    first, second = (2 * (tensors[name].float()[None] / 255) - 1 for name in ("image1", "image2"))
    with torch.no_grad():
        flows, backward = network(first, second, num_flow_updates=20), network(second, first, num_flow_updates=20)[-1]
    assert meta["iters"] == [6, 20]
    for updates in meta["iters"]:
        torch.testing.assert_close(flows[updates - 1][0], tensors[f"flow_up.iters{updates}"], atol=CLOSE, rtol=0)
    torch.testing.assert_close(backward[0], tensors["flow_up_backward.iters20"], atol=CLOSE, rtol=0)
    assert tensors["flow_up.iters20"].abs().max() > 5  # flows that say something


def test_feature_maps(network: torch.nn.Module) -> None:
    _, tensors = load("eval_raft")
    image = 2 * (tensors["image1"].float()[None] / 255) - 1
    with torch.no_grad():
        features, context = network.feature_encoder(image)[0], network.context_encoder(image)[0]
    torch.testing.assert_close(features, tensors["feature_map1"], atol=CLOSE, rtol=0)
    torch.testing.assert_close(context, tensors["context_output"], atol=CLOSE, rtol=0)
