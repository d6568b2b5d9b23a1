"""A process that is asked line by line."""

from __future__ import annotations

import sys

import pytest

from terselm.errors import TerseLMError
from terselm.evaluate.peer import PeerProcess

_ECHO = """
import json, os, sys
for line in sys.stdin:
    request = json.loads(line)
    if request == {"leave": 3}:
        sys.exit(3)
    print(json.dumps([request, os.environ["FLAVOUR"], os.environ["HF_HUB_OFFLINE"]]), flush=True)
"""


def test_it_answers_until_it_ends() -> None:
    process = PeerProcess("the echo", [sys.executable, "-c", _ECHO], {"FLAVOUR": "salt"})
    assert process.ask(text="é\n") == [{"text": "é\n"}, "salt", "1"]
    for _ in range(2):  # the second time the pipe is broken
        with pytest.raises(TerseLMError, match="the echo ended with status 3; its error is above"):
            process.ask(leave=3)
    process.close()
