"""Shared by all tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_sessionstart() -> None:
    """Test files are modules without packages: of two with one name pytest loads but one, and says so at the end."""
    names = Counter(path.name for path in Path(__file__).parent.rglob("test_*.py"))
    if twice := [name for name, count in names.items() if count > 1]:
        pytest.exit(f"several test files are called {', '.join(twice)}; give each a name of its own", returncode=2)


@pytest.fixture(autouse=True)
def one_thread_for_tiny_models(request: pytest.FixtureRequest) -> Iterator[None]:
    """Threads cost a tiny model more than they bring, the more so on a busy machine."""
    threads = torch.get_num_threads()
    if "model" not in request.keywords:
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
