"""The recording that the parity tests judge engines by."""

from __future__ import annotations

import pytest

from diffoundry.formats.recording import ComponentRecording
from tests.core.parity import fakes


@pytest.fixture
def recording() -> ComponentRecording:
    return fakes.make_recording()
