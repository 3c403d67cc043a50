"""What is installed, from which versions to which, and that nothing is fetched behind a user's back."""

import os
import re
import socket
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WANTED = [Requirement(text) for text in PROJECT["dependencies"]]
TOOLS = [one for one in map(Requirement, PROJECT["optional-dependencies"]["dev"]) if "==" not in str(one.specifier)]
OFFLINE = """
import importlib.util, pkgutil, socket, sys
def guard(event, given):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        raise SystemExit(f"{event} {given[1:] or given} while importing")
sys.addaudithook(guard)
import bridges, distill
for package in (distill, bridges):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if "kernels.cuda" not in module.name:
            __import__(module.name)
for path in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("recipe", path)
    sys.modules["recipe"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
print("imported", len([name for name in sys.modules if name.startswith(("distill", "bridges"))]))
"""


@pytest.mark.parametrize("wanted", [*WANTED, *TOOLS], ids=lambda wanted: wanted.name)
def test_a_dependency_has_both_bounds_and_what_is_installed_lies_between(wanted: Requirement) -> None:
    signs = sorted(one.operator for one in wanted.specifier)
    assert signs == ["<", ">="], str(wanted)
    assert wanted.specifier.contains(Version(version(wanted.name)).base_version)


def test_the_lowest_versions_are_those_of_the_project() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "reliability" / "lowest.py")], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    known = [*WANTED, *TOOLS]
    assert len(lines) == len(known) and all(re.fullmatch(r"[a-z]+==[\d.]+", line) for line in lines)
    assert all(wanted.specifier.contains(line.partition("==")[2]) for wanted, line in zip(known, lines, strict=True))


def test_nothing_asks_the_network_at_import() -> None:
    recipes = [str(path) for path in sorted((ROOT / "recipes").glob("*.py"))]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, *recipes],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 100


def test_tests_cannot_reach_beyond_this_machine() -> None:
    with pytest.raises(RuntimeError, match="stay on this machine"), socket.socket() as one:
        one.connect(("192.0.2.1", 80))
    with pytest.raises(RuntimeError, match="stay on this machine"):
        socket.getaddrinfo("huggingface.co", 443)
    with socket.socket() as server, socket.socket() as client:  # distributed tests talk on it
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
