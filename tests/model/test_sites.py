import pytest
import torch

from distill.model import (
    Chain,
    Edit,
    Record,
    Replace,
    kind_of,
    layer_of,
    node_locations,
    node_name,
    residual_sites,
    split_node,
)


def test_names_stand_in_the_order_of_the_run() -> None:
    assert node_locations(1) == (
        "0.attn.act_in",
        "0.attn.q",
        "0.attn.k",
        "0.attn.v",
        "0.attn.resid_delta",
        "0.mlp.act_in",
        "0.mlp.post_act",
        "0.mlp.resid_delta",
    )
    assert residual_sites(2) == ("0.resid_in", "0.resid_mid", "1.resid_in", "1.resid_mid", "final_resid")


def test_node_names_go_both_ways() -> None:
    assert node_name("3.attn.act_in", 83) == "3.attn.act_in.83"
    assert split_node("3.attn.act_in.83") == ("3.attn.act_in", 83)
    assert kind_of("12.mlp.post_act") == "mlp.post_act"
    assert layer_of("12.resid_mid") == 12


@pytest.mark.parametrize("name", ["3.attn.act_in", "attn.act_in.3", "3.attn.nowhere.1", "", "3.attn.q.x"])
def test_what_is_no_node_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"node|location") as error:
        split_node(name)
    assert repr(name) in str(error.value) or name.rpartition(".")[0] in str(error.value)


def test_a_site_without_a_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="final_resid"):
        layer_of("final_resid")


def test_record_keeps_only_what_it_is_asked_for() -> None:
    record = Record({"a"})
    x = torch.ones(2)
    assert record("a", x) is x
    record("b", x)
    assert list(record.values) == ["a"]


def test_replace_broadcasts_and_keeps_the_type() -> None:
    out = Replace({"a": torch.tensor([1.0, 2.0], dtype=torch.float64)})("a", torch.zeros(3, 2))
    assert out.dtype == torch.float32
    assert out.tolist() == [[1.0, 2.0]] * 3


def test_a_chain_calls_in_order_and_hands_extras_to_those_that_want_them() -> None:
    class Wanting:
        wants = frozenset({"pre"})

        def __init__(self) -> None:
            self.seen: list[str] = []

        def __call__(self, site: str, x: torch.Tensor, /) -> torch.Tensor:
            self.seen.append(site)
            return x

    plain, wanting = Record(), Wanting()
    tap = Chain(Edit({"a": lambda x: x + 1}), plain, wanting)
    assert tap.wants == {"pre"}
    tap("a.pre", torch.zeros(1))
    assert tap("a", torch.zeros(1)).item() == 1
    assert wanting.seen == ["a.pre", "a"]
    assert list(plain.values) == ["a"]
    assert plain.values["a"].item() == 1
