"""A process that is asked line by line."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from terselm import Prompt
from terselm.errors import TerseLMError
from terselm.evaluate.opening import PEERS
from terselm.evaluate.peer import Llmlingua, PeerProcess

_ECHO = """
import json, os, sys
for line in sys.stdin:
    request = json.loads(line)
    if request == {"leave": 3}:
        sys.exit(3)
    print(json.dumps([request, os.environ["FLAVOUR"], os.environ["HF_HUB_OFFLINE"]]), flush=True)
"""


_PACKAGE = """
class PromptCompressor:
    def __init__(self, folder, **options):
        self.folder = folder
    def compress_prompt(self, context, **options):
        print("noise")
        return {"compressed_prompt": repr([context, options])}
"""
_TIKTOKEN = """
class Encoding:
    def __init__(self, **options):
        pass
"""


@pytest.mark.parametrize("kind", PEERS)
def test_what_llmlingua_is_asked(kind: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "llmlingua.py").write_text(_PACKAGE)
    (tmp_path / "tiktoken").mkdir()
    (tmp_path / "tiktoken" / "__init__.py").write_text(_TIKTOKEN)
    (tmp_path / "tiktoken" / "registry.py").write_text("ENCODINGS = {}\n")
    peer = Llmlingua(tmp_path, str(tiny), "cpu", PEERS[kind])
    try:
        prompt = Prompt(instruction="i", demonstrations=["d", "e"], question="q")
        (answer,) = peer.compress([prompt], [9])
    finally:
        peer.close()
    context, options = ast.literal_eval(answer.text)
    assert context == ["d", "e"]
    assert options == {"instruction": "i", "question": "q", "target_token": 9, **PEERS[kind]}


def test_it_answers_until_it_ends() -> None:
    process = PeerProcess("the echo", [sys.executable, "-c", _ECHO], {"FLAVOUR": "salt"})
    assert process.ask(text="é\n") == [{"text": "é\n"}, "salt", "1"]
    for _ in range(2):  # the second time the pipe is broken
        with pytest.raises(TerseLMError, match="the echo ended with status 3; its error is above"):
            process.ask(leave=3)
    process.close()
