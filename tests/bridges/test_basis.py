import pytest
import torch
from torch import Tensor

from bridges import Comparison, Lineup
from bridges.basis import ROTATED, add_basis, add_rotated, factors, rotated, rotated_subject
from distill.circuits import Subject, node_means
from distill.data.tokens import train_tokenizer
from distill.model import DenseModel, SparseTransformer


def test_factors_are_the_product_in_its_own_axes() -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(6, 2, generator=generator), torch.randn(2, 6, generator=generator)
    one, other = factors(left, right)
    assert torch.allclose(one @ other, left @ right, atol=1e-5)
    singular = torch.linalg.svdvals(left @ right)[:2]
    assert torch.allclose(one.T @ one, torch.diag(singular), atol=1e-5)
    assert torch.allclose(other @ other.T, torch.diag(singular), atol=1e-5)


def test_a_rotated_model_computes_the_same(dense: DenseModel, windows: Tensor) -> None:
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name.endswith("bias"):
                parameter.add_(torch.linspace(-0.5, 0.5, parameter.numel()).view_as(parameter))
        before = dense.run(windows[:, :-1])
        turned = rotated(dense)
        assert torch.allclose(turned.run(windows[:, :-1]), before, atol=2e-4)
        assert torch.equal(dense.run(windows[:, :-1]), before)
    values = turned.matrices()["0.attn.act_in", "0.attn.v"][: dense.d_head]
    gram = values @ values.T
    assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-3)
    assert not torch.allclose(values, dense.matrices()["0.attn.act_in", "0.attn.v"][: dense.d_head], atol=1e-2)


def test_models_with_abstopk_are_refused(twin: SparseTransformer, windows: Tensor) -> None:
    tokenizer = train_tokenizer(["abc abc abc"], vocab_size=258)
    one = Subject(name="twin", model=twin, tokenizer=tokenizer, sample=windows, means=node_means(twin, windows[:, :-1]))
    with pytest.raises(ValueError, match="model: twin"):
        rotated_subject(one, "turned")


def test_the_bridged_dense_model_is_added_rotated(dense: DenseModel, windows: Tensor) -> None:
    tokenizer = train_tokenizer(["abc abc abc"], vocab_size=258)
    means = node_means(dense, windows[:, :-1])
    one = Subject(name="dense_gpt2", model=dense, tokenizer=tokenizer, sample=windows, means=means)
    found = add_rotated(Lineup(subjects=[one], bridges=None)).subjects
    assert [subject.name for subject in found] == ["dense_gpt2", "dense_gpt2_rotated"]
    # Reads stay what they are, values do not.
    assert torch.allclose(found[1].means.values["0.attn.act_in"], means.values["0.attn.act_in"], atol=1e-4)
    assert found[1].means.model == found[1].model.fingerprint() != means.model
    with pytest.raises(ValueError, match="bridge: none"):
        add_rotated(Lineup(subjects=[], bridges=None))


def test_sizes_in_the_models_own_basis_over_those_in_its_heads_axes() -> None:
    def one(edges: int, nodes: int, meets: bool = True) -> dict:
        return {"edges_induced": edges, "edges_pruned": edges // 2, "nodes": nodes, "meets_target": meets}

    rows = {
        "a": {"dense_gpt2": one(400, 20), ROTATED: one(100, 10)},
        "b": {"dense_gpt2": one(100, 10), ROTATED: one(100, 10)},
        "misses": {"dense_gpt2": one(900, 90), ROTATED: one(1, 1, meets=False)},
        "none": {"dense_gpt2": one(900, 90), ROTATED: dict.fromkeys(one(1, 1))},
    }
    found = add_basis(Comparison(record={"tasks": rows}, circuits={})).record["basis"]
    assert found["tasks"] == ["a", "b"]
    assert found["edge_ratio_geomean"] == found["pruned_edge_ratio_geomean"] == pytest.approx(2.0)
    assert found["node_ratio_geomean"] == pytest.approx(2**0.5)
    assert (
        add_basis(Comparison(record={"tasks": {"a": {"dense_gpt2": one(1, 1)}}}, circuits={})).record["basis"] is None
    )
