"""Shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread_for_tiny_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads cost a tiny model more than they bring, the more so on a busy machine."""
    threads = torch.get_num_threads()
    if "model" not in request.keywords:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
