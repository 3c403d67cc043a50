"""Areas under the curve, delays and probes, by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill.circuits.code_labels import LabelledCode
from distill.circuits.detection import CodeScore, Delay, auroc, fit_probe, on_code, probe_code, waits
from distill.circuits.watch import Scores, Watch
from distill.model import Architecture, SparseTransformer


def test_area_by_hand() -> None:
    assert auroc(torch.tensor([3.0, 2.0]), torch.tensor([1.0, 2.0, 0.0])) == pytest.approx(5.5 / 6)
    with pytest.raises(ValueError, match="needed is one of each"):
        auroc(torch.tensor([1.0]), torch.tensor([]))


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=20), st.lists(st.integers(-5, 5), min_size=1, max_size=20))
def test_area_is_the_share_of_pairs_in_order(one: list[int], other: list[int]) -> None:
    pairs = [(a > b) + 0.5 * (a == b) for a in one for b in other]
    found = auroc(torch.tensor(one, dtype=torch.float), torch.tensor(other, dtype=torch.float))
    assert found == pytest.approx(sum(pairs) / len(pairs))


def test_waits_by_hand() -> None:
    def row(text: str) -> torch.Tensor:
        return torch.tensor([letter == "1" for letter in text])

    #        before the window | flagged at once | after two | never
    inside = row("11" + "0" + "111" + "0" + "1111" + "0" + "11")
    first_ = row("00" + "0" + "100" + "0" + "1000" + "0" + "10")
    flags_ = row("11" + "1" + "110" + "0" + "0011" + "1" + "00")
    assert waits(flags_, inside, first_) == [0, 2, None]
    found = Delay.of([0, 2, None])
    assert (found.stretches, found.found, found.median) == (3, pytest.approx(2 / 3), 1.0)
    assert Delay.of([None]) == Delay(stretches=1, found=0.0, median=None, p90=None)


def test_strings_side_by_side_wait_each_for_itself() -> None:
    inside = torch.ones(4, dtype=torch.bool)
    first = torch.tensor([True, False, True, False])
    assert waits(torch.tensor([False, True, True, False]), inside, first) == [1, 0]


def test_code_scores_leave_other_strings_out() -> None:
    inside = torch.tensor([[1, 1, 2, 0, 0, 3, -1]])
    scores = Scores(
        strength=torch.tensor([[5.0, 5.0, 5.0, 1.0, 6.0, 9.0, 9.0]]), lean=torch.tensor([[2.0, 0.0, 1.0, 9, 9, 9, 9]])
    )
    assert CodeScore.of(scores, inside) == CodeScore(which=0.5, inside=0.5)


def test_a_probe_finds_a_direction() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator) * torch.tensor([1.0, 10, 1, 1, 0.1, 1]) + 3
    positive = x[:, 4] > 3
    probe = fit_probe(x[:200], positive[:200])
    values = probe(x[200:])
    assert auroc(values[positive[200:]], values[~positive[200:]]) > 0.99
    assert float(((values > 0) == positive[200:]).double().mean()) > 0.9
    with pytest.raises(ValueError, match="both classes"):
        fit_probe(x, torch.ones(400, dtype=torch.bool))


def test_on_code_reports_rates_and_probes_every_site() -> None:
    model = SparseTransformer.build(Architecture(vocab_size=6, context=8, n_layer=1, d_model=8, d_head=4)).eval()
    tokens = torch.randint(0, 6, (12, 9), generator=torch.Generator().manual_seed(1))
    # What is inside follows from the token, so every probe can tell.
    inside = torch.tensor([0, 1, 2, 0, 1, 2])[tokens]
    before = torch.cat([torch.zeros(12, 1, dtype=torch.long), inside[:, :-1]], 1)
    since = torch.where(inside == 0, -1, torch.where(inside == before, 1, 0))
    code = LabelledCode(tokens=tokens, inside=inside, closes=inside == 9, since=since)
    names = ("0.mlp.post_act.1", "0.attn.act_in.2")
    watch = Watch(
        model=model.fingerprint(), model_name="", task="", names=names, mean=torch.zeros(2), spread=torch.ones(2),
        effect=torch.ones(2), slope=torch.ones(2),
    )  # fmt: skip
    found = on_code(watch, model, code, {0.5: -1.0, 0.01: 99.0})
    assert found["tokens"] == 96 and found["rates"]["0.5"]["inside"] == found["rates"]["0.5"]["outside"] == 1.0
    assert found["rates"]["0.5"]["delay"]["median"] == 0 and found["rates"]["0.01"]["delay"]["found"] == 0
    probes = probe_code(model, code.part(slice(0, 6)), code.part(slice(6, 12)))
    assert set(probes) == {"0.resid_in", "0.resid_mid", "final_resid"}
    assert probes["0.resid_in"] == {"which": 1.0, "inside": 1.0}
