"""One tiny world that every room's tests share: its best strategy for each user is known by construction."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from metarec_gym.world import World
from tests.pretend_graph import pretend_gpu

# the tests' tensors are tiny: threads would only wait for each other
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_world() -> World:
    """Two user types, two specialists and `mixed`; nobody leaves; 4 requests of 2 items."""
    return World.synthetic(
        n_types=2,
        users_per_type=4,
        items_per_type=16,
        horizon=4,
        slate_size=2,
        high=0.5,
        low=0.1,
        history_lengths=(0, 3),
        leaving=None,
    )


@pytest.fixture(scope="session")
def leaving_world() -> World:
    """As `tiny_world`, longer, and users leave after unrewarded requests."""
    return World.synthetic(
        n_types=2,
        users_per_type=4,
        items_per_type=40,
        horizon=12,
        slate_size=3,
        history_lengths=(0, 3),
        leaving=(-3.0, 0.8),
    )


@pytest.fixture(scope="session")
def real_logs() -> Path:
    """Folder of real logs for tests; named by METAREC_DATA_DIR."""
    folder = os.environ.get("METAREC_DATA_DIR")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real logs: set METAREC_DATA_DIR to their folder")
    return Path(folder)


@pytest.fixture(params=[pytest.param("pretended", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A device that is not the CPU: a pretended one in the `slow` tests, CUDA itself in the `gpu` tests."""
    if request.param == "pretended":
        with pretend_gpu(monkeypatch) as device:
            yield device
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    yield "cuda"
