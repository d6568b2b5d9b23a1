"""What the client takes and gives: memory with many requests in flight, and how close it comes to a token limit.

    python benchmarks/collect_endpoint.py --out benchmarks/results/collect_endpoint.json

A server in a process of its own answers after five seconds (memory) or after 0.2 to 1 s (limit), and notes when each
request arrived and what it used. Five minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from bisect import bisect_left
from itertools import accumulate
from pathlib import Path
from typing import Any

import frame

IN_FLIGHT = 500
LATENCY = 5.0  # seconds
PER_MINUTE = 60_000
MINUTES = 4


def main() -> None:
    parser = frame.parser(__doc__, required=True)
    parser.add_argument("--serve", nargs=3, metavar=("LEAST", "MOST", "NOTES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(float(options.serve[0]), float(options.serve[1]), Path(options.serve[2])))
        return
    result = {
        "command": "python benchmarks/collect_endpoint.py",
        **frame.circumstances("openai"),
        "memory": memory(),
        "limit": limit(),
    }
    frame.write_result(options.out, result)
    print(json.dumps(result, indent=2))


def memory() -> dict[str, Any]:
    """Prompts of 2,000 characters and answers of 2,000, as many in flight as allowed from the first second on."""
    limits = [f"limits.concurrency={IN_FLIGHT}"]
    run = collect(5000, "word " * 400, (LATENCY, LATENCY), limits)
    arrived = sorted(when for when, _ in run["notes"])
    in_flight = max(bisect_left(arrived, when + LATENCY) - index for index, when in enumerate(arrived))
    return {
        "requests": 5000,
        "most_in_flight": in_flight,
        "peak_resident_mb": round(run["peak_kib"] * 1024 / 1e6, 1),
        "seconds": round(run["seconds"], 1),
    }


def limit() -> dict[str, Any]:
    """Requests of 250 tokens at most that use 100 to 220, for some minutes, at a limit that they could pass."""
    limits = ["limits.concurrency=64", f"limits.tokens_per_minute={PER_MINUTE}", "max_new_tokens=200"]
    run = collect(PER_MINUTE * MINUTES // 160, "Why?", (0.2, 1.0), limits)
    notes = sorted(run["notes"])
    times = [when for when, _ in notes]
    sums = [0, *accumulate(used for _, used in notes)]
    windows = [sums[bisect_left(times, when + 60)] - sums[index] for index, when in enumerate(times)]
    full = 60.0 * int((times[-1] - times[0]) // 60)
    used = sums[bisect_left(times, times[0] + full)]
    return {
        "tokens_per_minute": PER_MINUTE,
        "minutes": full / 60,
        "used_share": round(used / (PER_MINUTE * full / 60), 4),
        "most_in_any_60_s": max(windows),
    }


def collect(count: int, text: str, latency: tuple[float, float], settings: list[str]) -> dict[str, Any]:
    """Run the command against a server; its peak memory, its time, and what the server noted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = (json.dumps({"prompt": f"{number} {text}"}) + "\n" for number in range(count))
        (folder / "ask.jsonl").write_text("".join(rows))
        notes = folder / "notes.json"
        serving = [sys.executable, __file__, "--out", "-", "--serve", *map(str, latency), str(notes)]
        with subprocess.Popen(serving, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            endpoint = f"http://127.0.0.1:{server.stdout.readline().strip()}/v1"
            files = ["--instructions", str(folder / "ask.jsonl"), "--out", str(folder / "records.jsonl")]
            code = "from terselm.cli import main; main()"
            command = [sys.executable, "-c", code, "collect", *files, "--endpoint", endpoint, "--model", "m", *settings]
            start = time.perf_counter()
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - start
            server.terminate()
        assert status == 0, "the collection failed"
        return {"peak_kib": usage.ru_maxrss, "seconds": seconds, "notes": json.loads(notes.read_text())}


async def serve(least: float, most: float, notes: Path) -> None:
    """Answer every request after a while; on SIGTERM, write down (time of arrival, tokens) of each."""
    import signal

    chance, seen, ended = random.Random(0), [], asyncio.Event()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                length = int(head.split("content-length:")[1].split("\r\n")[0])
                prompt = json.loads(await reader.readexactly(length))["messages"][0]["content"]
                tokens = {"prompt_tokens": len(prompt.split()) + 8, "completion_tokens": chance.randint(90, 200)}
                seen.append((time.monotonic(), sum(tokens.values())))
                await asyncio.sleep(chance.uniform(least, most))
                message = {"role": "assistant", "content": "word " * 400}
                body = json.dumps(
                    {"choices": [{"message": message, "finish_reason": "stop"}], "model": "m", "usage": tokens}
                ).encode()
                header = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
                writer.write(header.encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(connection, "127.0.0.1", 0, backlog=1024)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print(server.sockets[0].getsockname()[1], flush=True)
    await ended.wait()
    notes.write_text(json.dumps(seen))


if __name__ == "__main__":
    frame.run(main)
