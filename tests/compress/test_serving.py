"""The service, through a real server on loopback."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import uvicorn
from fakes import random_lm

from terselm import Prompt, PromptCompressor
from terselm.compress.serving import Batcher, make_app, read

DEMONSTRATIONS = [f"Question: Sam had {n} apples and ate 2.\nAnswer: {n - 2} are left." for n in range(5, 11)]


class Counting(PromptCompressor):
    """Notes how many prompts came together."""

    def __init__(self) -> None:
        super().__init__(random_lm())
        self.sizes: list[int] = []

    def compress_batch(self, prompts: Any, **arguments: Any) -> Any:
        self.sizes.append(len(prompts))
        time.sleep(0.05)  # so that the next requests gather
        return super().compress_batch(prompts, **arguments)


@pytest.fixture(scope="module")
def compressor() -> Counting:
    return Counting()


@pytest.fixture(scope="module")
def client(compressor: Counting) -> Iterator[httpx.Client]:
    server = uvicorn.Server(uvicorn.Config(make_app(compressor), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        yield client
    server.should_exit = True
    thread.join()


def body(n: int = 3, **changes: Any) -> dict[str, Any]:
    return {"instruction": "Answer.", "demonstrations": DEMONSTRATIONS[:n], "question": f"{n} plums?"} | changes


def test_answers_are_those_of_the_compressor(client: httpx.Client, compressor: Counting) -> None:
    answer = client.post("/compress", json=body(rate=0.5, tokens=True, keep=["plums"])).json()
    prompt = Prompt(instruction="Answer.", demonstrations=DEMONSTRATIONS[:3], question="3 plums?")
    expected = compressor.compress_batch([prompt], rate=0.5, keep=["plums"])[0].to_dict(tokens=True)
    for figure in ("tokens_read", "tokens_cached"):
        answer.pop(figure), expected.pop(figure)
    assert [token["kept"] for token in answer.pop("tokens")] == [token["kept"] for token in expected.pop("tokens")]
    assert answer == expected


def test_requests_that_wait_together_are_compressed_together(client: httpx.Client, compressor: Counting) -> None:
    compressor.sizes.clear()
    asked = [body(1 + n % 6, **({"budget": 20 + n} if n % 3 else {"rate": 0.4})) for n in range(40)]
    asked[7]["rate"] = 3.0  # refused, and nobody else suffers
    asked[9]["budget"] = 1
    asked[9]["keep"] = ["Answer."]
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda one: client.post("/compress", json=one), asked))
    for n, (one, answer) in enumerate(zip(asked, answers, strict=True)):
        if n in (7, 9):
            assert answer.status_code == 422
            assert set(answer.json()) == {"error"}
            continue
        assert answer.status_code == 200
        assert answer.json()["compressed_tokens"] <= one.get("budget", answer.json()["budget"])
    assert max(compressor.sizes) > 1


def test_a_question_beside_a_text_is_what_it_is_ranked_for(client: httpx.Client, compressor: Counting) -> None:
    text, question = " ".join(DEMONSTRATIONS), "How many apples were 9?"
    answer = client.post("/compress", json={"text": text, "question": question, "rate": 0.4}).json()
    assert answer["text"] == compressor.compress_text(text, question=question, rate=0.4).text
    assert question not in answer["text"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"rate": 0.5},
        {"text": "a b c"},
        {"text": "a b c", "rate": 0.5, "budgte": 4},
        {"text": 3, "rate": 0.5},
        {"text": "a b c", "question": 3, "rate": 0.5},
        {"text": "a b c", "rate": 0.5, "keep": "a"},
        {"text": "a b c", "rate": 0.5, "counter": 3},
        {"text": "a b c", "rate": 0.5, "counter": "no/such/tokenizer"},
    ],
)
def test_what_cannot_be_compressed_is_refused_with_a_sentence(client: httpx.Client, wrong: dict[str, Any]) -> None:
    answer = client.post("/compress", json=wrong)
    assert answer.status_code == 422
    assert len(answer.json()["error"]) > 20


def test_who_no_longer_waits_is_passed_over(compressor: Counting) -> None:
    batcher = Batcher(compressor, 8)
    first = batcher.submit(read(body(rate=0.5)))
    gone, last = batcher.submit(read(body(1, rate=0.5))), batcher.submit(read(body(2, rate=0.5)))
    assert gone.cancel()  # while the first is being compressed
    assert first.result(60).compressed_tokens > 0
    assert last.result(60).compressed_tokens > 0
    batcher.close()


def test_health(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"model": random_lm().name, "window": random_lm().window}
