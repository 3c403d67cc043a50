"""The lowest versions that the project allows, as constraints for pip.

python tests/reliability/lowest.py > lowest.txt
python -m venv lowest && lowest/bin/pip install -e '.[dev]' -c lowest.txt && lowest/bin/pytest
"""

import tomllib
from pathlib import Path

for line in tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]["dependencies"]:
    name, _, bounds = line.partition(">=")
    print(f"{name}=={bounds.partition(',')[0]}")
