"""The tests' own surroundings hold: no network, and never the user's store."""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path

import pytest


def test_reaching_the_network_fails() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection,
        pytest.raises(PermissionError, match="tried to reach the network"),
    ):
        connection.connect(("192.0.2.1", 80))


def test_the_store_is_a_temporary_one() -> None:
    assert Path(os.environ["DIFFOUNDRY_CACHE"]).is_relative_to(tempfile.gettempdir())
