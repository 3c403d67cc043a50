"""What a training says while it goes on: lines in a file, the same to trackers, and a word for the progress bar."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers

from distill.artifact import ArtifactError, append_line, write_text
from distill.command import several_on_cpus
from distill.training.settings import TrainConfig

METRICS = "metrics.jsonl"
TENSORS = "tensors.jsonl"
PROJECT = "distill"
"""The name under which trackers file a run."""


def make_engine(config: TrainConfig, folder: Path) -> Accelerator:
    """Accelerate's engine with the trackers that the settings name; `ValueError` for one that is not installed."""
    installed = sorted(tracker.value for tracker in get_available_trackers())
    for name in config.trackers:
        if name not in installed:
            raise ValueError(
                f"trackers: got {name!r}, allowed are those installed: {', '.join(installed) or 'none is'}"
            )
    return Accelerator(cpu=several_on_cpus(), log_with=list(config.trackers) or None, project_dir=folder)


class Log:
    """The lines of one run, in its folder and in the engine's trackers."""

    def __init__(self, folder: Path, engine: Accelerator) -> None:
        self.folder, self.engine = folder, engine
        self.history: list[dict[str, Any]] = []
        """The lines of `METRICS`."""

    def start(self, config: TrainConfig) -> None:
        """Opens the trackers, which get the settings; those that the caller has opened stay as they are."""
        if self.engine.log_with and not self.engine.trackers:
            simple = {
                name: value if isinstance(value, bool | int | float | str) else json.dumps(value)
                for name, value in asdict(config).items()
            }
            self.engine.init_trackers(PROJECT, config=simple)

    def go_back(self, step: int) -> None:
        """Takes up the lines of an earlier process up to `step`; what it wrote after that is done again."""
        for name in (METRICS, TENSORS):
            path = self.folder / name
            if not path.exists():
                continue
            lines = _lines_until(path, step)
            if name == METRICS:
                self.history = lines
            if self.engine.is_main_process:
                write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

    def write(self, line: Mapping[str, Any], tensors: Mapping[str, Any] | None = None) -> None:
        """Adds a line, and what there is to say of each tensor."""
        self.history.append(dict(line))
        if not self.engine.is_main_process:
            return
        append_line(self.folder / METRICS, line)
        if tensors is not None:
            append_line(self.folder / TENSORS, {"step": line["step"], "tensors": tensors})
        self.engine.log({name: value for name, value in line.items() if name != "step"}, step=line["step"])

    def close(self) -> None:
        """Lets the trackers finish."""
        for tracker in self.engine.trackers:
            tracker.finish()


def _lines_until(path: Path, step: int) -> list[dict[str, Any]]:
    """The whole lines of steps up to `step`; a killed process may have left half a line at the end."""
    lines = []
    for number, raw in enumerate(path.read_bytes().rpartition(b"\n")[0].splitlines(), 1):
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict) or type(line.get("step")) is not int:
            raise ArtifactError(f"{path}, line {number}: is no line of a run; put it right or take it out to resume")
        if line["step"] <= step:
            lines.append(line)
    return lines


def in_short(line: Mapping[str, Any]) -> str:
    """A line for the progress bar."""
    return (
        f"loss {line['loss']:.3f}, kept {line['kept']:.3g}, rate {line['rate']:.3g}, "
        f"{line['tokens_per_second']:.0f} tokens/s"
    )
