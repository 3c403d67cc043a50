"""Jobs killed at random moments and resumed end bit for bit as they would have without; see `killed.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("killed.py")
JOBS = ("training", "bridges", "sweep")


def killed(jobs: tuple[str, ...], folder: Path, seed: int, kills: int) -> dict[str, dict[str, Any]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), ",".join(jobs), str(folder), str(seed), str(kills)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=7200)
    assert done.returncode == 0, done.stderr[-3000:]
    records = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {record["job"]: record for record in records}


def test_three_kills_change_nothing(tmp_path: Path) -> None:
    """All jobs in one process, whose imports take longer than they do."""
    records = killed(JOBS, tmp_path, 1, 3)
    assert sorted(records) == sorted(JOBS)
    for record in records.values():
        assert record["kills"] >= 3 and record["in_files"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS)
def test_twenty_kills_change_nothing(job: str, tmp_path: Path) -> None:
    record = killed((job,), tmp_path, 7, 20)[job]
    assert record["kills"] >= 20 and 5 <= record["in_files"] <= 15
