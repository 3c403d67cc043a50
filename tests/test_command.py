"""What a person mistypes comes back as one line and status 2; a bug keeps its traceback."""

import errno
import random
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch

from distill import command


@dataclass(frozen=True, kw_only=True)
class Config:
    """Shape of the model."""

    n_layer: int = 4
    """Number of layers."""
    norm: Literal["rms", "layer"] = "rms"
    """Which norm."""
    topk: float | None = 0.25
    """Fraction kept, None for all."""

    def __post_init__(self) -> None:
        if self.n_layer < 1:
            raise ValueError(f"n_layer: got {self.n_layer},\n   allowed are 1\r\nand more\u2028 {'far' * 50}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a recipe."""

    data: Path
    """Folder of tokens."""
    config: Config = Config()
    """The model."""
    task: tuple[str, ...] = ("quote",)
    """Tasks, one or more."""
    overwrite: bool = False
    """Replace an earlier run."""

    def __post_init__(self) -> None:
        if self.data.name == "bad":
            raise ValueError(f"data: got {self.data}, allowed is a folder {'/long' * 60}")
        if self.data.name == "warn":
            warnings.warn("careful", UserWarning, stacklevel=2)


PRESETS = {
    "tiny": {"config.n_layer": 2, "config.topk": None, "task": ("a", "b"), "overwrite": True},
    "dense": {"config.topk": -1e-5, "overwrite": False, "config.norm": "layer"},
    "broken": {"config.n_layer": -1},
}


def call(line: str, body: Any = None, presets: Any = PRESETS) -> tuple[int, list[Options]]:
    seen: list[Options] = []
    status = command.run(body or seen.append, Options, line.split(), description="Train.\n\nMore.", presets=presets)
    return status, seen


def test_flags_reach_the_body() -> None:
    line = "--data x --config.n-layer 8 --config.norm layer --task a b c --overwrite --config.topk None"
    expected = Options(
        data=Path("x"), config=Config(n_layer=8, norm="layer", topk=None), task=("a", "b", "c"), overwrite=True
    )
    assert call(line) == (0, [expected])
    assert call(line, presets=None) == (0, [expected])
    assert call("--data=x --config.n_layer=8 --no-overwrite")[1] == [Options(data=Path("x"), config=Config(n_layer=8))]
    assert type(call(line)[1][0]) is Options


def test_flags_of_the_process_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "x"])
    seen: list[Options] = []
    assert command.run(seen.append, Options, None, description="") == 0
    assert seen == [Options(data=Path("x"))]


@pytest.mark.parametrize("flag", ["--preset tiny", "--preset=tiny", "--preset dense --preset tiny"])
def test_preset_sets_defaults(flag: str) -> None:
    expected = Options(data=Path("x"), config=Config(n_layer=2, topk=None), task=("a", "b"), overwrite=True)
    assert call(f"--data x {flag}") == (0, [expected])


@pytest.mark.parametrize("place", ["{flags} --preset tiny", "--preset tiny {flags}"])
def test_flags_win_over_the_preset(place: str) -> None:
    _, [seen] = call("--data x " + place.format(flags="--config.n-layer 5 --no-overwrite --task z"))
    assert seen == Options(data=Path("x"), config=Config(n_layer=5, topk=None), task=("z",))


def test_preset_with_a_negative_number_and_a_false() -> None:
    assert call("--data x --preset dense")[1] == [Options(data=Path("x"), config=Config(topk=-1e-5, norm="layer"))]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", ["--data PATH", "Folder of tokens.", "required"]),
        ("--data", ["--data", "Expected 1"]),
        ("--data x --config.n-layer many", ["--config.n-layer", "'many'", "INT", "Number of layers."]),
        ("--data x --config.topk many", ["--config.topk", "'many'", "{None}|FLOAT"]),
        ("--data x --config.norm batch", ["--config.norm", "'batch'", "'rms'", "'layer'"]),
        ("--data x --config.n-layer 0", ["config: n_layer: got 0, allowed are 1 and more far", "far" * 50]),
        ("--data bad", ["error: data: got bad, allowed is a folder " + "/long" * 60]),
        ("--data x --nope 3", ["--nope", "--help"]),
        ("--data x --config.n-layr 3", ["--config.n-layr", "--config.n-layer INT"]),
        ("--data x stray", ["stray"]),
        ("--data x --overwrite yes", ["yes"]),
        ("--data x --preset huge", ["--preset", "'huge'", "'tiny'", "'dense'"]),
        ("--data x --preset", ["--preset", "Expected 1"]),
        ("--data x --preset broken", ["n_layer: got -1"]),
    ],
)
def test_bad_flag_is_one_line(line: str, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(line) == (2, [])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and err.endswith("\n")
    assert not set(err) & set("│─╭╰\x1b")
    for words in said:
        assert words in err


@pytest.mark.parametrize(
    "box",
    [
        " Value error \n -------- \n  \x1b[31mError parsing Options: x\x1b[0m \n  ----\n  For full helptext\n",
        "╭─ Value error ───╮\n│ Error parsing Options: x │\n│ ──── │\n│ For full helptext, see --help │\n╰────╯\n",
    ],
    ids=["plain", "unicode"],
)
def test_both_drawings_of_the_box_are_read(box: str) -> None:
    assert command._reason(box, "Options") == "x"


@pytest.mark.parametrize("line", ["--help", "-h", "--preset tiny --help", "--data x --help"])
def test_help_is_complete(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(line) == (0, [])
    out, err = capsys.readouterr()
    assert err == ""
    flat = " ".join(out.replace("│", " ").split())
    for words in (
        "Train.",
        "--data PATH",
        "Folder of tokens.",
        "--config.n-layer INT",
        "Number of layers.",
        "{rms,layer}",
    ):
        assert words in flat
    for words in (
        "--task",
        "--overwrite, --no-overwrite",
        "--preset {",
        "tiny: config.n_layer 2,",
        "task a b",
        "dense:",
    ):
        assert words in flat
    assert max(map(len, out.splitlines())) <= 80


def test_help_without_presets_has_no_such_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help", presets=None) == (0, [])
    assert "--preset" not in capsys.readouterr().out


def test_terminal_width_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    call("--nope")
    assert "COLUMNS" not in command.os.environ
    monkeypatch.setenv("COLUMNS", "70")
    call("--nope")
    assert command.os.environ["COLUMNS"] == "70"


def test_warnings_while_parsing_are_not_swallowed(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *rest: print(message, file=sys.stderr)
        assert call("--data warn")[0] == 0
    assert "careful" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("task: got 'x'\nallowed is y"), "error: task: got 'x' allowed is y\n"),
        (ValueError(), "error: ValueError\n"),
        (FileNotFoundError(errno.ENOENT, "No such file", "a/b"), "error: a/b: No such file\n"),
        (FileExistsError(errno.EEXIST, "File exists", "a", None, "b"), "error: a -> b: File exists\n"),
        (PermissionError("not yours"), "error: not yours\n"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a"), "error: a: Is a directory\n"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a"), "error: a: Not a directory\n"),
        (OSError(errno.ENOSPC, "No space left"), f"error: [Errno {errno.ENOSPC}] No space left\n"),
        (OSError(errno.EROFS, "Read-only", "a"), "error: a: Read-only\n"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "a"), "error: a: File name too long\n"),
    ],
)
def test_bad_input_in_the_body_is_one_line(error: Exception, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    def body(_: Options) -> None:
        raise error

    assert call("--data x", body)[0] == 2
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [RuntimeError("bug"), TypeError("bug"), KeyError("bug"), OSError(errno.EIO, "disk")])
def test_bugs_keep_their_traceback(error: Exception) -> None:
    def body(_: Options) -> None:
        raise error

    with pytest.raises(type(error)):
        call("--data x", body)


def test_interrupt_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def body(_: Options) -> None:
        raise KeyboardInterrupt

    assert call("--data x", body)[0] == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_import_is_light() -> None:
    code = "import sys, distill.command; sys.exit('torch' in sys.modules and 'distill.model' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_seeds_decide_all_generators() -> None:
    def draw() -> tuple[float, float, float]:
        command.seed_everything(7)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw() == draw()


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed: got {seed}, allowed are 0 to 4294967295"):
        command.seed_everything(seed)


def test_device_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.pick_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert command.pick_device("auto") == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert command.pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device: got 'cuda:2', but torch sees 2 CUDA devices"):
        command.pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="device: got 'cuda', but torch sees 0 CUDA devices"):
        command.pick_device("cuda")
    with pytest.raises(ValueError, match="device: got 'mps', allowed are auto, cpu, cuda"):
        command.pick_device("mps")


@pytest.mark.parametrize("name", ["", "gpu", "meta", "cuda:x", "cuda:-1"])
def test_device_unknown(name: str) -> None:
    with pytest.raises(ValueError, match=f"device: got '{name}', allowed are auto, cpu"):
        command.pick_device(name)
