"""An endpoint as the target: what it has answered is never asked again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from faulty_server import Faults, Server, answer_to, serving

from terselm.errors import ConfigError
from terselm.evaluate.run import evaluate
from terselm.evaluate.settings import EvaluateSettings, SuiteSettings, TargetSettings
from terselm.evaluate.targets import EndpointTarget
from terselm.models.chat import ChatMode


def settings_for(url: str, tiny: Path, **options: Any) -> TargetSettings:
    return TargetSettings(model="m", base_url=url, counter=str(tiny), **options)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_answers_are_asked_for_once(tmp_path: Path, tiny: Path, api: str) -> None:
    server = Server()
    server.keep_requests = True
    with serving(server) as url:
        target = EndpointTarget(settings_for(url, tiny, api=api), tmp_path / "answers.jsonl")
        prompts = ["one to: two", "three", "one to: two"]
        answers = target.generate(prompts, max_new_tokens=9, stop=(" to: ", "x"))
        again = EndpointTarget(settings_for(url, tiny, api=api), tmp_path / "answers.jsonl")
        more = again.generate([*prompts, "four"], max_new_tokens=9, stop=(" to: ", "x"))
    assert answers == [answer_to(prompt).split(" to: ")[0] for prompt in prompts]
    assert more[:3] == answers
    assert sum(server.answered.values()) == 3
    (_, body, _) = server.requests[0]
    assert body["stop"] == [" to: ", "x"]
    assert (body["temperature"], body["max_tokens"]) == (0.0, 9)
    assert ("prompt" in body) == (api == "completions")


def test_answers_of_a_chat_are_whole(tmp_path: Path, tiny: Path) -> None:
    server = Server()
    server.keep_requests = True
    with serving(server) as url:
        target = EndpointTarget(settings_for(url, tiny, chat=ChatMode.ALWAYS), tmp_path / "answers.jsonl")
        assert target.generate(["one to: two"], max_new_tokens=9, stop=(" to: ",)) == [answer_to("one to: two")]
    assert target.chat
    assert "stop" not in server.requests[0][1]


def test_refused_prompts_count_as_wrong(tmp_path: Path, tiny: Path) -> None:
    with serving(Server()) as url:
        target = EndpointTarget(settings_for(url, tiny), tmp_path / "answers.jsonl")
        answers = target.generate(["a [filtered] b", "c"], max_new_tokens=9, stop=())
    assert answers == ["", answer_to("c")]


def test_an_evaluation_goes_on_without_asking_twice(tmp_path: Path, tiny: Path, gsm8k: Path) -> None:
    server = Server(Faults(latency=(0.0, 0.01)))
    suite = SuiteSettings(questions=6, sets=2, shots=3, data=gsm8k / "test.jsonl", train=gsm8k / "train.jsonl")
    with serving(server) as url:
        settings = EvaluateSettings(
            suite=suite,
            target=settings_for(url, tiny, price=2.0),
            methods=["truncate", "truncate-end"],
            budgets=["half-shot"],
            score=False,
            generate=True,
            batch=2,
        )
        figures, _ = evaluate(settings, tmp_path / "out")
        asked = sum(server.answered.values())
        (tmp_path / "out" / "journal.jsonl").unlink()  # even without what was measured, the answers are there
        again, _ = evaluate(settings, tmp_path / "out")
    assert asked == sum(server.answered.values())
    assert max(server.answered.values()) == 1
    assert [one.quality for one in again] == [one.quality for one in figures]
    whole, short = figures[1], figures[2]
    assert short.saved == pytest.approx((whole.tokens - short.tokens) * 2.0 / 1000)
    assert "exact_match" in short.quality


def test_what_endpoints_cannot_do(tmp_path: Path, tiny: Path) -> None:
    target = EndpointTarget(settings_for("http://127.0.0.1:9/v1", tiny), tmp_path / "answers.jsonl")
    with pytest.raises(ConfigError, match="set score=false and generate=true"):
        target.score(["a"], ["b"])
    with pytest.raises(ConfigError, match=r"target\.api is 'text'"):
        settings_for("http://127.0.0.1:9/v1", tiny, api="text")


def test_scores_cannot_be_asked_of_an_endpoint(tmp_path: Path, tiny: Path, gsm8k: Path) -> None:
    suite = SuiteSettings(questions=2, sets=1, shots=2, data=gsm8k / "test.jsonl", train=gsm8k / "train.jsonl")
    settings = EvaluateSettings(suite=suite, target=settings_for("http://127.0.0.1:9/v1", tiny))
    with pytest.raises(ConfigError, match="does not give log-probabilities; set score=false and generate=true"):
        evaluate(settings, tmp_path / "out")
