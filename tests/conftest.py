"""Every test runs on one thread, offline, and draws no window."""

import os
import socket
import sys
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch

HERE = {None, "", "localhost", "127.0.0.1", "::1", "0.0.0.0", "::", socket.gethostname()}
"""Addresses on this machine."""
_REACHING = {"socket.connect", "socket.sendto", "socket.sendmsg"}
_ASKING = {"socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"}
_network = [False]


def _guard(event: str, given: tuple[Any, ...]) -> None:
    """Refuses whatever would leave this machine, in this process; Python calls it before it asks the system."""
    if event in _REACHING and not _network[0]:
        address = given[1]
        if isinstance(address, tuple) and address[0] not in HERE:
            raise RuntimeError(f"{event} to {address}: tests without the marker network stay on this machine")
    elif event in _ASKING and not _network[0]:
        host = given[0].decode() if isinstance(given[0], bytes) else given[0]
        if host not in HERE:
            raise RuntimeError(f"{event} of {host}: tests without the marker network stay on this machine")


sys.addaudithook(_guard)


@pytest.fixture(autouse=True)
def _network_for_those_marked(request: pytest.FixtureRequest) -> None:
    _network[0] = request.node.get_closest_marker("network") is not None


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
