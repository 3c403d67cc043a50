"""The four models of a comparison, trained from scratch at a size that two cores can do within the hour."""

from dataclasses import replace
from pathlib import Path

from bridges.fit import StudentConfig, fit_bridges
from bridges.folder import METRICS_FILE
from bridges.lineup import Lineup, load_lineup
from bridges.objective import BridgeConfig
from distill.data import TokenData, prepare
from distill.model import Architecture, DenseModel, SparseTransformer, load_model
from distill.training import TrainConfig, pretrain

SOURCES = ("stdlib", "idioms:6")
ARCHITECTURE = Architecture(context=128, n_layer=3, d_model=128)
DENSE_WIDTH = 48
GPT2_WIDTH = 96
TRAINING = TrainConfig(context=128, batch=16, steps=4000, kept=1 / 16, learning_rate=0.03, eval_every=500)
GPT2_TRAINING = replace(TRAINING, kept=1.0, learning_rate=3e-3, eps=1e-8, grad_rms="clip")
# Bridges stand beside the projected weights and want a far smaller rate: at an equal one their NMSE stays above 1.
FIT_TRAINING = replace(TRAINING, batch=8, learning_rate=0.04, dense_rate=0.05)


def train_lineup(folder: Path, *, steps: int = TRAINING.steps, seed: int = 0) -> Lineup:
    """Trains a sparse model, the same code kept dense, a GPT-2, and a student with bridges of that GPT-2.

    Each goes into a folder of its own below `folder`; what is finished there is taken as it is, what was interrupted
    is gone on with, so that the same call can be repeated. `steps` is the length of each training. ValueError for
    settings that changed in the middle of a training.
    """
    data = prepare(SOURCES, folder / "tokens", vocab_size=ARCHITECTURE.vocab_size, seed=seed)
    config, gpt2, fit = (replace(one, steps=steps, seed=seed) for one in (TRAINING, GPT2_TRAINING, FIT_TRAINING))
    narrow = replace(ARCHITECTURE, d_model=DENSE_WIDTH, n_head=None, d_mlp=None)
    _pretrain(SparseTransformer.build(ARCHITECTURE, seed=seed), data, config, folder / "sparse")
    _pretrain(SparseTransformer.build(narrow, seed=seed), data, replace(config, kept=1.0), folder / "dense")
    wide = replace(ARCHITECTURE, d_model=GPT2_WIDTH, n_head=None, d_mlp=None)
    _pretrain(DenseModel.build_gpt2(wide, seed=seed), data, gpt2, folder / "dense_gpt2")
    _fit(data, fit, folder)
    return load_lineup(str(folder / "sparse"), str(folder / "dense"), str(folder / "student"))


def _pretrain(model: SparseTransformer | DenseModel, data: TokenData, config: TrainConfig, folder: Path) -> None:
    if not (folder / "model" / "manifest.json").is_file():
        command = "recipes/quickstart.py --from-scratch"
        pretrain(model, data, config, folder, tokenizer=data.tokenizer(), command=command, resume=folder.exists())


def _fit(data: TokenData, config: TrainConfig, folder: Path) -> None:
    out = folder / "student"
    if (out / METRICS_FILE).is_file():
        return
    dense = load_model(folder / "dense_gpt2")
    shape = StudentConfig(d_model=ARCHITECTURE.d_model)
    student = SparseTransformer.build(shape.architecture(dense), seed=config.seed)
    fit_bridges(
        dense,
        student,
        data,
        BridgeConfig(seed=config.seed),
        config,
        out,
        dense_name=str(folder / "dense_gpt2"),
        tokenizer=data.tokenizer(),
        resume=True,
        command="recipes/quickstart.py --from-scratch",
    )
