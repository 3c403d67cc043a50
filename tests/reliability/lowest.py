"""The lowest versions that the project allows, as constraints for pip; what is pinned is left out.

python tests/reliability/lowest.py > lowest.txt
python -m venv lowest && lowest/bin/pip install -e '.[dev]' -c lowest.txt && lowest/bin/pytest -W default
"""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
    name, sign, bounds = line.partition(">=")
    if sign:
        print(f"{name}=={bounds.partition(',')[0]}")
