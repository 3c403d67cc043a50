from pathlib import Path

import pytest
import torch
from torch import Tensor

from bridges.agreement import agreement, token_losses
from bridges.figures import node_counts, plot_bridge, plot_locations, plot_size_loss
from distill.model import SparseTransformer


def test_agreement_by_hand() -> None:
    targets = torch.tensor([[0, 1, 2, 3]])
    one = torch.tensor([[1.0, 2.0, 4.0, 8.0]]), torch.tensor([[0, 2, 0, 0]])
    other = torch.tensor([[1.0, 4.0, 16.0, 64.0]]), torch.tensor([[0, 2, 1, 3]])
    found = agreement(one, other, targets)
    assert found["pearson_log"] == pytest.approx(1.0) and found["spearman"] == pytest.approx(1.0)
    # Three errors: the same one, another one, none.
    assert found["same_error"] == pytest.approx(1 / 3) and found["both_wrong"] == pytest.approx(2 / 3)
    sure = torch.zeros(1, 4), targets
    assert set(agreement(sure, sure, targets).values()) == {None}


def test_token_losses_are_the_models_loss(twin: SparseTransformer, windows: Tensor) -> None:
    losses, choices = token_losses(twin, windows, batch=4)
    with torch.no_grad():
        logits = twin.run(windows[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert float(losses.mean()) == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(choices, logits.argmax(-1))


def test_counts_by_layer_and_location() -> None:
    nodes = {f"{layer}.{kind}": torch.zeros(3, dtype=torch.bool) for layer in range(2) for kind in ("attn.q", "attn.k")}
    nodes["1.attn.k"][:2] = True
    counts = node_counts(nodes)
    assert counts.shape == (8, 2) and counts[2, 1] == 2 and counts.sum() == 2


def test_figures_are_drawn(tmp_path: Path) -> None:
    site = {"site": "0.resid_in", "effect": 0.5, "ceiling": 0.9, "controls": [0.1], "class_means": None,
            "unrelated": 0.2}  # fmt: skip
    tests = [{"test": test, "site": "0.resid_in", "loss": 0.3, "loss_full": 0.1, "other": {"principal": 0.2},
              "controls": [0.5, 0.6], "families": {"channels": [0.4]}} for test in
             ("sufficiency", "necessity")]  # fmt: skip
    plot_bridge({"a": {"interchange": {"sites": [site]}, "bridge": tests}}, tmp_path / "bridge.png")
    rows = [{"target": 0.1, "edges_induced": 9, "reason": ""}, {"target": 0.01, "reason": "out of reach"}]
    plot_size_loss({("a", "sparse"): rows, ("a", "dense"): rows}, tmp_path / "size.png")
    for name in ("bridge.png", "size.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="tasks: none"):
        plot_bridge({"a": {"interchange": None}}, tmp_path / "none.png")
    with pytest.raises(ValueError, match="curves"):
        plot_size_loss({}, tmp_path / "none.png")
    with pytest.raises(ValueError, match="circuits"):
        plot_locations({}, tmp_path / "none.png")
