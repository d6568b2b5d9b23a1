"""An OpenAI-compatible server for tests that fails as real ones do. It answers `answer_to(prompt)`.

Run as a script, it prints its port and serves until it is killed; in a test, `serving` runs it in a thread.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import re
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

Handler = Callable[["Server", str, dict[str, str], bytes], Awaitable["Reply"]]


@dataclass
class Reply:
    """What is sent back; ``cut`` bytes of the body are held back before the connection is dropped."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    cut: int = 0


class DropError(Exception):
    """Close the connection without a reply."""


@dataclass
class Faults:
    """Shares of the requests, of which at most one befalls each; and how long an answer takes, in seconds."""

    rate_limit: float = 0.0
    server_error: float = 0.0
    hang: float = 0.0
    drop: float = 0.0
    torn: float = 0.0
    malformed: float = 0.0
    latency: tuple[float, float] = (0.0, 0.0)
    retry_after: str = "0"
    hang_for: float = 3600.0


def answer_to(prompt: str) -> str:
    """What the model says, whoever asks."""
    return f"Answer {hashlib.sha256(prompt.encode()).hexdigest()[:12]} to: {prompt}"


def fate(prompt: str) -> str | None:
    """Prompts that say so fail for good: ``[refused]``, ``[filtered]``, ``[cut]``, ``[broken]``, ``[empty]``."""
    found = re.search(r"\[(refused|filtered|cut|broken|empty)\]", prompt)
    return found[1] if found else None


class Server:
    """State and behaviour; `handle` may be replaced by a test."""

    def __init__(self, faults: Faults | None = None, seed: int = 0) -> None:
        self.faults = faults or Faults()
        self.random = random.Random(seed)
        self.answered: Counter[str] = Counter()
        self.injected: Counter[str] = Counter()
        self.requests: list[tuple[float, dict[str, Any], dict[str, str]]] = []
        self.keep_requests = False
        self.handle: Handler = chat
        self.flying = self.most_flying = 0

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path, _ = head[0].split(" ", 2)
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:] if line)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                self.flying += 1
                self.most_flying = max(self.most_flying, self.flying)
                try:
                    reply = await self.handle(self, f"{method} {path}", headers, body)
                finally:
                    self.flying -= 1
                lines = [f"HTTP/1.1 {reply.status} X", f"content-length: {len(reply.body)}"]
                lines += [
                    f"{name}: {value}" for name, value in {"content-type": "application/json", **reply.headers}.items()
                ]
                data = "\r\n".join(lines).encode() + b"\r\n\r\n" + reply.body
                writer.write(data[: len(data) - reply.cut])
                await writer.drain()
                if reply.cut:
                    return
        except (DropError, asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()

    async def start(self) -> int:
        server = await asyncio.start_server(self.connection, "127.0.0.1", 0, backlog=1024)
        return int(server.sockets[0].getsockname()[1])


def error(status: int, message: str, code: str | None = None, **headers: str) -> Reply:
    body = json.dumps({"error": {"message": message, "code": code, "type": "x"}}).encode()
    return Reply(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


async def chat(server: Server, path: str, headers: dict[str, str], body: bytes) -> Reply:
    """``/chat/completions`` and ``/completions``, with the server's faults."""
    if path == "GET /stats":
        return Reply(body=json.dumps({"answered": server.answered, "injected": server.injected}).encode())
    asked = json.loads(body)
    if server.keep_requests:
        server.requests.append((asyncio.get_running_loop().time(), asked, headers))
    await asyncio.sleep(server.random.uniform(*server.faults.latency))
    kind = inject(server)
    if kind == "rate_limit":
        pause = {"retry_after": server.faults.retry_after} if server.random.random() < 0.5 else {}
        return error(429, "Rate limit reached", "rate_limit_exceeded", **pause)
    if kind == "server_error":
        return error(500, f"The server had an error; your key was {headers.get('authorization')}")
    if kind == "hang":
        await asyncio.sleep(server.faults.hang_for)
    if kind == "drop":
        raise DropError
    plain = "prompt" in asked
    prompt = asked["prompt"] if plain else asked["messages"][-1]["content"]
    match fate(prompt):
        case "refused":
            return error(400, "This model's maximum context length is exceeded", "context_length_exceeded")
        case "filtered":
            return error(400, "The response was filtered", "content_filter")
        case "broken":
            return error(500, "Always broken")
    reply = Reply(body=json.dumps(completion(asked, prompt)).encode())
    if kind == "torn":
        reply.cut = len(reply.body) // 2
    elif kind == "malformed":
        reply.body = server.random.choice([reply.body[: len(reply.body) // 2], b"<html>", b'{"choices": []}', b""])
    else:
        server.answered[prompt] += 1
    return reply


def inject(server: Server) -> str | None:
    """The fault of this request, if it has one."""
    drawn = server.random.random()
    for name in ("rate_limit", "server_error", "hang", "drop", "torn", "malformed"):
        drawn -= getattr(server.faults, name)
        if drawn < 0:
            server.injected[name] += 1
            return name
    return None


def completion(asked: dict[str, Any], prompt: str) -> dict[str, Any]:
    """A response in OpenAI's form; a word is a token."""
    text = {"empty": "", "cut": ""}.get(fate(prompt) or "", answer_to(prompt))
    if asked.get("echo"):
        return echoed(prompt)
    reason = "content_filter" if fate(prompt) == "cut" else "stop"
    words = re.findall(r"\S+\s*", text)
    choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
    if "prompt" in asked:
        choice["text"] = text
    else:
        choice["message"] = {"role": "assistant", "content": text}
    if asked.get("logprobs"):
        top = [{"token": "x", "bytes": [120], "logprob": -3.0}] * int(asked.get("top_logprobs") or 0)
        choice["logprobs"] = {
            "content": [
                {"token": w, "bytes": list(w.encode()), "logprob": -0.25 * (n % 4), "top_logprobs": top}
                for n, w in enumerate(words)
            ]
        }
    usage = {"prompt_tokens": len(prompt.split()) + 4, "completion_tokens": len(words)}
    return {"model": "served-1", "system_fingerprint": "fp_1", "choices": [choice], "usage": usage}


def echoed(prompt: str) -> dict[str, Any]:
    """A given text, scored: a word is a token, likely (−0.5) where it has come before, else not (−4)."""
    tokens = re.findall(r"\s*\S+|\s+$", prompt)
    words = [token.strip() for token in tokens]
    values = [None, *(-0.5 if word in words[:place] else -4.0 for place, word in enumerate(words) if place)]
    logprobs = {"tokens": tokens, "token_logprobs": values, "top_logprobs": None}
    choice = {"index": 0, "finish_reason": "length", "text": prompt, "logprobs": logprobs}
    usage = {"prompt_tokens": len(tokens), "completion_tokens": 0}
    return {"model": "served-1", "choices": [choice], "usage": usage}


@contextmanager
def serving(server: Server) -> Iterator[str]:
    """Serve in a thread; yield the endpoint's URL."""
    loop = asyncio.new_event_loop()
    port = loop.run_until_complete(server.start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def end() -> None:
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)

    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with suppress(RuntimeError):
            asyncio.run_coroutine_threadsafe(end(), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()


def main() -> None:
    """Serve until killed, with a fifth of 429 and a tenth of everything else."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    faults = Faults(
        rate_limit=0.2,
        server_error=0.04,
        hang=0.01,
        drop=0.03,
        torn=0.02,
        malformed=0.03,
        latency=(0.0, 2 * given.latency),
    )

    async def run() -> None:
        print(await Server(faults, given.seed).start(), flush=True)
        await asyncio.Event().wait()

    asyncio.run(run())


if __name__ == "__main__":
    main()
