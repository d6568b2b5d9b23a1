"""Several processes that open a new ledger at the same moment."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

from terselm.data.collection.ledger import Ledger


def test_a_new_ledger_is_made_once(tmp_path: Path) -> None:
    together = Barrier(8)

    def open_it(path: Path) -> int:
        together.wait()
        ledger = Ledger(path)
        try:
            return len(ledger.states())
        finally:
            ledger.close()

    with ThreadPoolExecutor(8) as pool:
        for attempt in range(40):
            assert list(pool.map(open_it, [tmp_path / f"{attempt}.ledger"] * 8)) == [0] * 8
