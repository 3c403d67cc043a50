"""What a step of student and bridges costs, in units of a dense forward and a student's forward and backward."""

import statistics
from collections.abc import Callable

import torch
from measure import seconds_of, setting_of
from work import Row

from bridges import BridgeConfig, BridgeObjective, Bridges
from distill.model import Architecture, DenseModel, SparseTransformer, operations
from distill.training.sparsity import project_, sparse_parameters

MOST = 2.5
"""Units that a step with sampled sites may take."""


def student_of(dense: DenseModel, width: int) -> SparseTransformer:
    """A student at kept 1/16 with learned positions."""
    architecture = Architecture(
        d_model=width, n_layer=dense.n_layer, vocab_size=dense.vocab_size, context=dense.context, position="added"
    )
    model = SparseTransformer.build(architecture)
    for parameter in sparse_parameters(model).values():
        project_(parameter, 1 / 16)
    return model


def bridge(turns: int) -> list[Row]:
    """A GPT-2 of width 256 and its student of width 512, 4 x 128 tokens a step, 4 and 12 layers."""
    rows: list[Row] = []
    for layers in (4, 12):
        shape = Architecture(d_model=256, n_layer=layers, vocab_size=2048, context=128)
        dense = DenseModel.build_gpt2(shape)
        student = student_of(dense, 512)
        ids = torch.randint(2048, (4, 129), generator=torch.Generator().manual_seed(0))
        found = {}
        for sites in ("sample", "all"):
            config = BridgeConfig(sites=sites)
            bridges = Bridges(config.shape(dense, student))
            step = _step(BridgeObjective(dense, student, bridges, config), student, bridges, ids)
            # Sampled sites cost more the earlier they lie: a whole deck of them is one round.
            rounds = 2 * layers + 1 if sites == "sample" else 1
            found[sites] = _units(step, _unit(dense, student, ids), turns, rounds)
        name = f"bridge step, {layers} layers, dense D=256, student D=512"
        each, whole = found["sample"], found["all"]
        print(f"{name}: {each:.2f} units with sampled sites (asked: at most {MOST}), {whole:.1f} with all")
        rows.append({"what": name, "units_sampled": each, "units_all": whole, "asked_at_most": MOST})
    return rows


def _unit(dense: DenseModel, student: SparseTransformer, ids: torch.Tensor) -> Callable[[], None]:
    def once() -> None:
        with torch.no_grad():
            dense.run(ids[:, :-1])
        operations.cross_entropy(student.run(ids[:, :-1]), ids[:, 1:]).backward()
        student.zero_grad()

    return once


def _step(
    objective: BridgeObjective, student: SparseTransformer, bridges: Bridges, ids: torch.Tensor
) -> Callable[[int], None]:
    def once(number: int) -> None:
        loss, _ = objective(ids, number)
        loss.backward()
        student.zero_grad()
        bridges.zero_grad()

    return once


def _units(step: Callable[[int], None], unit: Callable[[], None], turns: int, rounds: int) -> float:
    """Median over turns of the seconds of a mean step over those of a unit."""
    ratios = []
    with setting_of("auto", tuned=True):
        step(0)
        for _ in range(turns):
            steps = sum(seconds_of(lambda number=number: step(number), 1) for number in range(rounds)) / rounds
            ratios.append(steps / seconds_of(unit, 3))
    return statistics.median(ratios)


SECTIONS: dict[str, Callable[[int], list[Row]]] = {"bridge": bridge}
