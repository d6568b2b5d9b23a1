"""An OpenAI-compatible server (``/completions``) around a real model, for tests and measurements on loopback.

    python model_server.py MODEL LOG

Prints its port. Requests that wait are answered together. Every prompt that is answered goes into LOG, one JSON string
a line.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
from concurrent.futures import Future
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from terselm.data.generate import Answer, Limits, Query, generate
from terselm.models import CausalLM, load_causal_lm

_TOGETHER = 16
Waiting = tuple[dict[str, Any], "Future[Answer]"]


def answer_forever(lm: CausalLM, waiting: queue.Queue[Waiting], log: Path) -> None:
    while True:
        batch = [waiting.get()]
        while len(batch) < _TOGETHER and not waiting.empty():
            batch.append(waiting.get())
        queries = [
            Query(prompt=body["prompt"], temperature=0.0, seed=0, stop=tuple(body.get("stop") or ()))
            for body, _ in batch
        ]
        limits = Limits(max_new_tokens=min(body["max_tokens"] for body, _ in batch))
        for (body, future), answer in zip(batch, generate(lm, queries, limits), strict=True):
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(body["prompt"]) + "\n")
            future.set_result(answer)


def main() -> None:
    name, log = sys.argv[1:]
    waiting: queue.Queue[Waiting] = queue.Queue()
    lm = load_causal_lm(name, device="cpu")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            future: Future[Answer] = Future()
            waiting.put((body, future))
            answer = future.result()
            usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
            choice = {"index": 0, "text": answer.text, "finish_reason": answer.finish_reason}
            reply = json.dumps({"model": name, "choices": [choice], "usage": usage}).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *_: object) -> None:
            pass

    threading.Thread(target=answer_forever, args=(lm, waiting, Path(log)), daemon=True).start()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
