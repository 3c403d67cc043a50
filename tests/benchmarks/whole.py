"""Whole trainings from dense to the target, and the memory that a step holds."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Int
from measure import all_in_turns, allocate
from torch import Tensor
from work import VOCABULARY, Row, training_run

from distill.artifact import Provenance
from distill.model import Architecture, SparseTransformer
from distill.training import TrainConfig, next_token_loss, sparse_parameters, train
from distill.training.candidates import CandidateConfig
from distill.training.trainer import LINEAR_PATH, Terms

STEPS = 60
CONFIG = TrainConfig(
    steps=STEPS, batch=16, context=128, kept=1 / 16, learning_rate=0.03, log_every=STEPS, eval_every=0, save_every=0
)
"""The laptop preset of train_sparse, shortened: the same share of the steps at every kept fraction."""
ARCHITECTURE = Architecture(vocab_size=VOCABULARY, context=128, n_layer=3)


def training(config: TrainConfig, folder: Path, *, tuned: bool, linear_path: str) -> None:
    """One run of `train` from the first to the last step, with glibc's allocation as asked."""
    model = SparseTransformer.build(ARCHITECTURE)
    loss = next_token_loss(model)

    def objective(tokens: Int[Tensor, "B T1"], step: int) -> tuple[Tensor, Terms]:
        if step == 0:
            allocate(tuned)  # the loop tunes it when it begins
        return loss(tokens, step)

    data = np.random.RandomState(0).randint(VOCABULARY, size=1 << 16)
    provenance = Provenance(kind="run", command="tests/benchmarks/bench_all.py", config={}, seed=0, data=None)
    train(
        model,
        objective,
        data,
        config,
        folder,
        sparse=sparse_parameters(model),
        provenance=provenance,
        linear_path=linear_path,
    )


def laptop(turns: int) -> list[Row]:
    """The laptop preset from kept 1 to its target; which products leave out zeros is timed before."""
    with tempfile.TemporaryDirectory() as scratch:
        folder, count = Path(scratch), iter(range(1000))

        def run(*, tuned: bool, linear_path: str, **changes: object) -> Callable[[], None]:
            config = replace(CONFIG, **changes)
            return lambda: training(config, folder / str(next(count)), tuned=tuned, linear_path=linear_path)

        training(replace(CONFIG, steps=1), folder / "timed", tuned=True, linear_path="auto")
        timed = str(folder / "timed" / LINEAR_PATH)
        candidates = {"candidate_mode": True, "candidates": CandidateConfig(refresh=20)}
        lines = all_in_turns(
            run(tuned=False, linear_path="dense"),
            {
                "laptop preset, whole run from dense to target": (
                    run(tuned=True, linear_path=timed),
                    {"least": 4, "stretch": 8},
                ),
                "laptop preset with candidates, whole run": (run(tuned=True, linear_path=timed, **candidates), {}),
            },
            turns=turns,
        )
    tokens = CONFIG.steps * CONFIG.batch * CONFIG.context
    for line in lines:
        speeds = {"reference": tokens / line.reference, "fast": tokens / line.fast}
        line.more["tokens_per_second"] = speeds
        print(f"  {speeds['reference']:,.0f} -> {speeds['fast']:,.0f} tokens per second")
    return [*lines]


def memory(turns: int) -> list[Row]:
    """Bytes of gradients and optimiser state between two choices of candidates, beside those of dense Adam."""
    shape, sizes = (4096, 1, 0.004), []
    for candidates in (False, True):
        once = training_run(*shape, candidates=candidates)
        for _ in range(2):
            once.step()
        sizes.append(once.held())
    share = sizes[1] / sizes[0]
    dense, sampled = (size / 2**20 for size in sizes)
    print(f"gradients and optimiser state, D=4096, 0.4%: {dense:.0f} -> {sampled:.0f} MiB, {share:.1%}")
    row = {"what": "gradients and optimiser state, D=4096, L=1, 0.4%", "dense": sizes[0], "candidates": sizes[1]}
    return [row | {"share": share, "asked_at_most": 0.2}]


SECTIONS: dict[str, Callable[[int], list[Row]]] = {"laptop": laptop, "memory": memory}
