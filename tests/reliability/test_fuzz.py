"""Loaders of every format against spoiled files: a value comes out, or a `ValueError`; nothing else, for no input."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

SEEDS = st.integers(0, 2**32 - 1)


def bench_of(known: Any, place: Path) -> Any:
    spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).with_name("fuzz.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules.get("fuzz") or importlib.util.module_from_spec(spec)
    if "fuzz" not in sys.modules:
        sys.modules["fuzz"] = module
        spec.loader.exec_module(module)
    return module.Bench(known, place)


def kept_seeds(test: Callable[..., None]) -> Callable[..., None]:
    """Seeds under which some loader once raised something else; one file of each format is spoiled by each."""
    for seed in (
        11,
        67,
        70,
        84,
        101,
        111,
        112,
        131,
        132,
        134,
        144,
        195,
        196,
        201,
        210,
        268,
        1176,
        1443,
        3417,
        3624,
        5431,
        50088,
    ):
        test = example(seed=seed)(test)
    return test


def fuzzed(known: Any, place: Path, number: int) -> None:
    bench, found = bench_of(known, place), {"loaded": 0, "refused": 0}

    @kept_seeds
    @settings(max_examples=number, deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(seed=SEEDS)
    def holds(seed: int) -> None:
        found[bench.outcome(seed)] += 1

    holds()
    assert found["refused"] > found["loaded"] / 50  # the faults do reach what is read


@pytest.mark.filterwarnings("default")  # transformers speaks its mind about strange settings
def test_spoiled_files_are_loaded_or_refused_in_words(known: Any, tmp_path: Path) -> None:
    fuzzed(known, tmp_path, 20)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_ten_thousand_spoiled_files_are_loaded_or_refused_in_words(known: Any, tmp_path: Path) -> None:
    fuzzed(known, tmp_path, 10_000)
