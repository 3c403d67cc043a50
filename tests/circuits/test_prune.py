"""Pruning finds the planted circuit; targets, prices and budgets do what they say; bad input is named."""

import json
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from distill.circuits.ablation import MeansMismatchError, NonFiniteError, node_means
from distill.circuits.answers import answer_difference, two_way_loss
from distill.circuits.faithfulness.minimality import minimality
from distill.circuits.masks import all_nodes
from distill.circuits.memory import DeviceMemoryError
from distill.circuits.prune import LABEL_BETTER, PruneConfig, prune, prune_batches, split_prompts
from distill.circuits.selection import TargetError
from distill.circuits.settings import goal_for, target_for
from distill.circuits.tasks import load_task
from distill.model import DenseModel, load_tokenizer

QUICK = {"steps": 30, "pairs": 8}


def run(model, means, make_prompts, *, corpus=None, **settings):
    config = PruneConfig(**(QUICK | settings))
    train, val, verify = (make_prompts(pairs, seed) for pairs, seed in ((64, 1), (32, 2), (32, 3)))
    return prune_batches(model, "opener", train, val, means, config, verify=verify, corpus=corpus)


@pytest.mark.parametrize("seed", range(5))
def test_the_planted_circuit_is_found_exactly_by_the_default_settings(
    make_planted, make_prompts, make_windows, planted_names, planted_edges, seed
):
    model = make_planted(seed, stray=0.1)
    before = model.fingerprint()
    train, val, verify = (make_prompts(pairs, 10 * seed + place) for place, pairs in enumerate((64, 32, 32)))
    means = node_means(model, make_windows(16))
    circuit = prune_batches(model, "opener", train, val, means, PruneConfig(seed=seed), verify=verify)
    assert set(circuit.node_names) == set(planted_names)
    found = {(source, target) for source, target, _ in circuit.to_json(model)["edges"]}
    assert found == set(planted_edges)
    assert circuit.losses["circuit"] <= circuit.target == 0.15
    assert circuit.losses["verify"] <= circuit.target and circuit.provenance["verified"]
    assert circuit.losses["calibrated"] <= circuit.losses["circuit"] + 1e-3
    assert circuit.losses["empty"] > 0.5 > circuit.losses["full"]
    assert model.fingerprint() == before and all(p.requires_grad for p in model.parameters())


def test_the_same_seed_gives_the_same_circuit(planted, planted_means, make_prompts):
    first, second = (run(planted, planted_means, make_prompts, seed=4, steps=8, clean_up=0) for _ in range(2))
    assert first.node_names == second.node_names and first.losses == second.losses
    for location, score in first.scores.items():
        assert torch.equal(score, second.scores[location])


def test_clean_up_only_removes(planted, planted_means, make_prompts):
    rough, clean = (
        run(planted, planted_means, make_prompts, seed=1, steps=3, screen=0, clean_up=runs, edge_clean_up=0)
        for runs in (0, 60)
    )
    assert rough.provenance["nodes_before_clean_up"] == rough.n_nodes == clean.provenance["nodes_before_clean_up"]
    assert clean.n_nodes < rough.n_nodes and rough.kept_edges is None
    assert not any(bool(mask.any()) for mask in clean.difference(rough).values())


@pytest.mark.parametrize(
    "settings",
    [
        {"controller": "coefficient"},
        {"tie_qk": False},
        {"estimator": "hard_concrete"},
        {"estimator": "hard_concrete", "controller": "lagrangian", "density": 0.1, "screen": 0},
        {"estimator": "attribution"},
        {"estimator": "attribution", "attribution": "gradient"},
        {"objective": "faithful"},
        {"freeze_norms": True},
        {"calibrated": True},
        {"rows": 7},
    ],
)
def test_other_settings_meet_the_target_too(planted, planted_means, make_prompts, planted_names, settings):
    circuit = run(planted, planted_means, make_prompts, **settings)
    if not settings.get("calibrated"):
        assert set(circuit.node_names) >= set(planted_names)
        assert circuit.losses["circuit"] <= 0.15 and circuit.losses["verify"] <= 0.15
    assert circuit.losses["calibrated"] <= 0.15
    assert circuit.provenance["norms"] == ("frozen" if settings.get("freeze_norms") else "free")
    if settings.get("objective") == "faithful":
        assert circuit.losses["faithful"] <= 0.05 and "verify_faithful" in circuit.losses


@pytest.mark.parametrize("ablation", ["task", "resample", "zero"])
def test_other_ablation_values(planted, planted_means, make_prompts, make_windows, planted_names, ablation):
    circuit = run(planted, planted_means, make_prompts, corpus=make_windows(), ablation=ablation)
    assert set(circuit.node_names) >= set(planted_names)
    assert circuit.losses["circuit"] <= 0.15 and circuit.losses["verify"] <= 0.15
    assert circuit.means.kind == ("mean" if ablation == "resample" else ablation)
    assert ablation in circuit.provenance["ablation"]
    if ablation == "resample":
        with pytest.raises(ValueError, match="ablation: got 'resample'; allowed: mean, task, zero where no windows"):
            run(planted, planted_means, make_prompts, ablation=ablation)


def test_without_screening_all_nodes_start_on(planted, planted_means, make_prompts):
    circuit = run(planted, planted_means, make_prompts, screen=0, steps=1, lr=1e-6)
    tau = torch.cat(list(circuit.scores.values()))
    assert float((tau - 0.1).abs().max()) < 0.05 and float(tau.min()) > 0


def test_dense_models_and_untied_means_per_position(make_planted, make_prompts, make_windows):
    model = make_planted(0, None)
    circuit = run(model, node_means(model, make_windows(), per_position=True), make_prompts)
    assert circuit.losses["circuit"] == pytest.approx(circuit.losses["competition"], abs=1e-6)
    assert circuit.provenance["ablation"] == "mean per position"


def test_the_summary_is_plain_json_with_everything_needed_to_run_again(planted, planted_means, make_prompts):
    circuit = run(planted, planted_means, make_prompts, time_budget=0.5)
    provenance = json.loads(json.dumps(circuit.to_json()))["provenance"]
    assert PruneConfig(**provenance["config"]) == PruneConfig(**QUICK, time_budget=0.5)
    assert sum(provenance["seconds"].values()) < 1.5
    assert provenance["label"] == ""


def test_a_target_below_the_model_is_labelled(planted, planted_means, make_prompts):
    with torch.no_grad():
        planted.unembed.weight *= 0.3
    means = node_means(planted, torch.randint(0, 5, (32, 12), generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        full = float(two_way_loss(answer_difference(planted, make_prompts(32, 2))))
    try:
        circuit = run(planted, means, make_prompts, target=full * 0.99)
    except TargetError as error:
        assert f"the full model has {full:.4g}" in str(error)
    else:
        assert circuit.provenance["label"] == LABEL_BETTER
        assert circuit.losses["circuit"] <= circuit.target < full


def test_a_faithful_circuit_cannot_be_better_than_the_model(planted, planted_means, make_prompts):
    with torch.no_grad():
        planted.unembed.weight *= 0.3
    means = node_means(planted, torch.randint(0, 5, (32, 12), generator=torch.Generator().manual_seed(0)))
    full = float(two_way_loss(answer_difference(planted, make_prompts(32, 2)).detach()))
    with pytest.raises(TargetError, match=f"is below what the full model reaches, {full:.4g}; a circuit that is to be"):
        run(planted, means, make_prompts, target=full * 0.99, objective="faithful")


def test_too_little_memory_says_how_many_prompts_fit(planted, planted_means, make_prompts, monkeypatch):
    run_model = type(planted).run

    def small(self, tokens, **options):
        if len(tokens) > 12:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_model(self, tokens, **options)

    monkeypatch.setattr(type(planted), "run", small)
    with pytest.raises(DeviceMemoryError, match="rows: 128 pairs of prompts at once .* 4 fit: give rows 8 and pairs 4"):
        run(planted, planted_means, make_prompts)
    assert run(planted, planted_means, make_prompts, rows=8, pairs=4).losses["circuit"] <= 0.15
    monkeypatch.setattr(type(planted), "run", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(DeviceMemoryError, match="not even one pair fits"):
        run(planted, planted_means, make_prompts)


def test_a_target_out_of_reach_says_what_was_reached(planted, planted_means, make_prompts):
    with torch.no_grad():
        planted.unembed.weight.zero_()
    means = node_means(planted, torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(TargetError, match="0.1 nats is out of reach: the full model has 0.6931"):
        run(planted, means, make_prompts, target=0.1, steps=2)
    with pytest.raises(ValueError, match="relative: got 'a full model at 0.693 nats'"):
        run(planted, means, make_prompts, relative=True)


def test_relative_target_by_hand():
    assert target_for(PruneConfig(target=0.2), full=0.0) == 0.2
    assert target_for(PruneConfig(relative=True), full=0.0) == pytest.approx(0.17 * math.log(2))
    assert target_for(PruneConfig(relative=True), full=0.5) == pytest.approx(math.log(2) - 0.83 * (math.log(2) - 0.5))


def test_room_under_the_target_by_hand():
    assert goal_for(PruneConfig(target=0.2, headroom=0.3), target=0.2, full=0.1) == pytest.approx(0.14)
    assert goal_for(PruneConfig(headroom=0.3, relative=True), target=0.3, full=0.2) == pytest.approx(0.27)
    assert goal_for(PruneConfig(target=0.2, goal=0.05), target=0.2, full=0.0) == 0.05


def test_prompts_to_learn_decide_and_verify_on_share_no_pair():
    task, config = load_task("while_return_true"), PruneConfig(train_pairs=20, val_pairs=4, verify_pairs=4)
    split = split_prompts(task, load_tokenizer("sparse"), config)
    assert [len(batch) // 2 for batch in (split.train, split.val, split.verify)] == [20, 8, 8]
    prompts = [
        tuple(row[: int(last) + 1].tolist())
        for batch in (split.train, split.val, split.verify)
        for row, last in zip(batch.tokens, batch.last, strict=True)
    ]
    assert len(set(prompts)) == len(prompts) == 72


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": "nice"}, "objective: got 'nice'; allowed: paper, faithful"),
        ({"controller": "none"}, "controller: got 'none'; allowed: constraint, coefficient, lagrangian"),
        ({"estimator": "guess"}, "estimator: got 'guess'; allowed: heaviside, hard_concrete, attribution"),
        ({"estimator": "attribution", "screen": 0}, "screen: got 0; allowed: 1 and more for attribution"),
        ({"attribution": "x"}, "attribution: got 'x'; allowed: integrated, gradient"),
        ({"ablation": "noise"}, "ablation: got 'noise'; allowed: mean, task, resample, zero"),
        ({"density": 1.0}, "density: got 1.0"),
        ({"faithful_limit": 0.0}, "faithful_limit: got 0.0"),
        ({"edge_clean_up": -1}, "edge_clean_up: got -1"),
        ({"rows": 0}, "rows: got 0; allowed: 1 and more"),
        ({"goal": 0.5}, "goal: got 0.5; allowed: numbers above 0 up to target"),
        ({"target": 0.0}, "target: got 0.0; allowed: numbers above 0"),
        ({"target": math.nan}, "target: got nan"),
        ({"lr": -1.0}, "lr: got -1.0"),
        ({"smoothing": 1.0}, "smoothing: got 1.0"),
        ({"steps": 0}, "steps: got 0; allowed: 1 and more"),
        ({"clean_up": -1}, "clean_up: got -1"),
        ({"start_room": 0.5}, "start_room: got 0.5"),
        ({"candidates": 0.9}, "candidates: got 0.9; allowed: 1 and more"),
        ({"shrink": 1.0}, r"shrink: got 1.0; allowed: numbers in \[0, 1\)"),
        ({"start_spread": 2.0}, "start_spread: got 2.0"),
        ({"init_bias": 2.0}, "init_bias: got 2.0"),
        ({"time_budget": 0.0}, "time_budget: got 0.0"),
        ({"weight_decay": -0.1}, "weight_decay: got -0.1"),
    ],
)
def test_bad_settings_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        PruneConfig(**settings)


def test_means_of_another_model_are_refused(planted, make_planted, make_prompts, make_windows):
    with pytest.raises(MeansMismatchError, match="means: measured on model"):
        run(planted, node_means(make_planted(1), make_windows()), make_prompts)


def test_broken_activations_are_named(planted, planted_means, make_prompts, make_windows):
    means = node_means(planted, make_windows())
    with torch.no_grad():
        planted.layers[0].attn_q.bias[3] = float("nan")
    object.__setattr__(means, "model", planted.fingerprint())
    with pytest.raises(NonFiniteError, match=r"0\.attn\.q: activations are not finite"):
        run(planted, means, make_prompts)


def test_an_empty_task_is_refused(planted, planted_means, make_prompts):
    batch = make_prompts(4, 0)
    with pytest.raises(ValueError, match="task: got 'opener'; allowed: tasks with at least one pair"):
        prune_batches(planted, "opener", batch.select(slice(0, 0)), batch, planted_means, PruneConfig())


def test_from_a_task_file_and_a_tokenizer(
    tmp_path, planted, planted_means, planted_names, make_task_file, word_tokenizer
):
    task = load_task(make_task_file(tmp_path / "opener.jsonl"))
    circuit = prune(planted, task, word_tokenizer, planted_means, PruneConfig(**QUICK), model_name="planted")
    assert set(circuit.node_names) == set(planted_names)
    assert circuit.task == task.name and circuit.model_name == "planted"


def test_a_model_whose_edges_cannot_be_cut_is_pruned_to_nodes(planted, make_prompts, make_windows):
    config = LlamaConfig(
        vocab_size=planted.vocab_size, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=planted.context, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = DenseModel(LlamaForCausalLM(config).eval())
    means = node_means(model, make_windows(16))
    with pytest.raises(ValueError, match="edge_clean_up: got 3; allowed: 0, as the model has a gated MLP and values"):
        run(model, means, make_prompts, steps=2, edge_clean_up=3)
    circuit = run(model, means, make_prompts, steps=2, target=2.0, edge_clean_up=0)
    assert circuit.kept_edges is None and 0 < circuit.losses["circuit"] <= 2.0
    check = minimality(model, circuit.with_nodes(all_nodes(model.widths)), make_prompts(4, 5))
    assert check.details["edges"] == 0 == check.details["edges_tried"] < check.details["nodes_tried"]
