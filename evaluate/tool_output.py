"""The suite ``tools``: what agents' tools print, made from a seed, with questions that one exact string in it answers.

Six kinds, each of 1,000 to 8,000 tokens: a service's log, nested JSON, a stack trace in a console, a diff, a Markdown
table, and a listing of folders with lines found by grep. Nothing is copied from anywhere. An answer is no use without
what it belongs to (a port without its service), so an item names its owners and what could be mistaken for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

_CHARACTERS_PER_TOKEN = 2.6  # of such text, roughly
_LENGTHS = (1_000, 2_000, 4_000, 8_000)  # tokens


@dataclass(frozen=True, kw_only=True)
class Owner:
    """What an answer belongs to.

    Attributes:
        name: as it stands in the text.
        rivals: what stands in the same place for other answers.
    """

    name: str
    rivals: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """One text, and a question about a detail of it.

    Attributes:
        kind: of text.
        text: the tool's output.
        question: answered by one string of the text.
        answer: that string.
        owners: what it belongs to, the outermost first.
    """

    kind: str
    text: str
    question: str
    answer: str
    owners: tuple[Owner, ...]

    def kept(self, text: str) -> bool:
        """Whether a compressed text still holds the answer with all that it belongs to."""
        return holds(text, self.answer, self.owners)


def holds(text: str, answer: str, owners: Sequence[Owner]) -> bool:
    """Whether the answer stands somewhere so that a reader can tell whose it is.

    An owner stands in the answer's line, or is the nearest of itself and its rivals before the answer.
    """
    begin = text.find(answer)
    while begin >= 0:
        line = text[text.rfind("\n", 0, begin) + 1 : (text.find("\n", begin) + 1 or len(text) + 1) - 1]
        before = text[:begin]
        if all(owner.name in line or _is_nearest(owner, before) for owner in owners):
            return True
        begin = text.find(answer, begin + 1)
    return False


def _is_nearest(owner: Owner, before: str) -> bool:
    own = before.rfind(owner.name)
    return own >= 0 and own > max((before.rfind(rival) for rival in owner.rivals), default=-1)


def tool_outputs(count: int, seed: int, kinds: Sequence[str] = ()) -> list[Lookup]:
    """``count`` items a kind, of lengths in turn; the same seed gives the same items.

    Args:
        count: items of each kind.
        seed: of the generator.
        kinds: of `KINDS`; none: all.
    """
    return [
        KINDS[kind](Random(f"{seed} {kind} {number}"), int(_LENGTHS[number % len(_LENGTHS)] * _CHARACTERS_PER_TOKEN))
        for kind in kinds or KINDS
        for number in range(count)
    ]


_SERVICES = (
    *("billing", "checkout", "inventory", "ledger", "mailer", "payments", "profile", "quota", "refunds", "router"),
    *("scheduler", "search", "sessions", "shipping", "tax", "thumbnails", "uploads", "vault", "webhooks", "zones"),
)
_VERBS = ("accepted", "cached", "closed", "dispatched", "fetched", "opened", "polled", "queued", "refreshed", "synced")
_NOUNS = ("batch", "bucket", "channel", "cursor", "job", "lease", "manifest", "partition", "shard", "snapshot", "token")


def _hex(random: Random, digits: int) -> str:
    return f"{random.getrandbits(4 * digits):0{digits}x}"


def _name(random: Random) -> str:
    return f"{random.choice(_VERBS)}_{random.choice(_NOUNS)}"


def _log(random: Random, size: int) -> Lookup:
    lines: list[str] = []
    requests: list[str] = []
    second = random.randrange(40_000)
    while sum(map(len, lines)) < size:
        second += random.randrange(1, 9)
        stamp = f"2026-03-{1 + second // 86_400:02}T{second // 3600 % 24:02}:{second // 60 % 60:02}:{second % 60:02}Z"
        service, level = random.choice(_SERVICES), random.choices(("INFO", "DEBUG", "WARN"), (8, 5, 2))[0]
        if random.random() < 0.35:
            requests.append(f"req-{_hex(random, 6)}")
            action = f"{requests[-1]} {random.choice(('GET', 'POST', 'PUT'))} /v2/{random.choice(_NOUNS)}s"
            line = f"{action} status={random.choice((200, 201, 204, 304, 404, 409))} took={random.randrange(3, 900)}ms"
        else:
            line = f"{random.choice(_VERBS)} {random.choice(_NOUNS)} {_hex(random, 8)} in {random.randrange(2, 400)}ms"
        lines.append(f"{stamp} {level:5} [{service}] {line}")
    place = random.randrange(len(lines) // 8, len(lines))
    service, code = random.choice(_SERVICES), f"E{random.randrange(10_000, 99_999)}"
    request = f"req-{_hex(random, 6)}"
    lines.insert(
        place, f"{lines[place - 1][:20]} ERROR [{service}] {request} failed: upstream refused the lease, code {code}"
    )
    return Lookup(
        kind="log",
        text="\n".join(lines),
        question=f"With which error code did request {request} fail in the {service} service?",
        answer=code,
        owners=(Owner(name=request, rivals=tuple(requests)),),
    )


def _json(random: Random, size: int) -> Lookup:
    names = random.sample([f"{service}-{region}" for service in _SERVICES for region in ("eu", "us", "ap")], 60)
    settings: dict[str, object] = {}
    used: list[str] = []
    for name in names:
        settings[name] = {
            "image": f"registry.local/{name}:{random.randrange(1, 9)}.{random.randrange(30)}.{random.randrange(10)}",
            "network": {"host": f"10.{random.randrange(256)}.{random.randrange(256)}.{random.randrange(1, 255)}"},
            "resources": {"cpu": random.randrange(1, 16), "memory": f"{random.randrange(1, 64)}Gi"},
            "replicas": random.randrange(1, 12),
            "flags": {_name(random): random.random() < 0.5 for _ in range(3)},
        }
        network = settings[name]["network"]  # type: ignore[index]
        network["port"] = random.randrange(2_000, 65_000)
        network["timeout_ms"] = random.randrange(100, 9_999)
        used.append(name)
        if len(json.dumps(settings, indent=2)) >= size:
            break
    name = random.choice(used[len(used) // 4 :])
    return Lookup(
        kind="json",
        text=json.dumps({"deployments": settings}, indent=2),
        question=f"Which port does the deployment {name} listen on?",
        answer=f'"port": {settings[name]["network"]["port"]}',  # type: ignore[index]
        owners=(Owner(name=f'"{name}"', rivals=tuple(f'"{other}"' for other in used if other != name)),),
    )


def _trace(random: Random, size: int) -> Lookup:
    lines: list[str] = []
    frames: list[str] = []
    while sum(map(len, lines)) < size:
        if random.random() < 0.4:
            lines.append(f"collecting {_name(random)} {random.randrange(1, 99)}% [{'#' * random.randrange(20):20}]")
            continue
        file = f"/srv/app/{random.choice(_SERVICES)}/{_name(random)}.py"
        frames.append(f'"{file}", line {random.randrange(10, 900)}')
        lines.append(f"  File {frames[-1]}, in {_name(random)}")
        lines.append(
            f"    {random.choice(_NOUNS)} = self.{_name(random)}({random.choice(_NOUNS)}, retry={_hex(random, 1)})"
        )
    file, number = f"/srv/app/{random.choice(_SERVICES)}/apply_{_hex(random, 4)}.py", random.randrange(1_000, 9_999)
    key = f"{random.choice(_NOUNS)}_{_hex(random, 6)}"
    cause = [
        "Traceback (most recent call last):",
        f'  File "{file}", line {number}, in settle',
        f"    total = amounts[{random.choice(_NOUNS)}]",
        f"KeyError: '{key}'",
        "",
        "The above exception was the direct cause of the following exception:",
        "",
        "Traceback (most recent call last):",
    ]
    # The cause stands before the frames of what it brought down, as Python prints it.
    place = random.randrange(len(lines) // 4, len(lines))
    ask_line = random.random() < 0.5
    return Lookup(
        kind="trace",
        text="\n".join([*lines[:place], *cause, *lines[place:], "RuntimeError: the worker could not settle its batch"]),
        question=f"In which line of {file.rpartition('/')[2]} was the original exception raised?"
        if ask_line
        else "Which key was missing when the original KeyError was raised?",
        answer=f"line {number}" if ask_line else key,
        owners=(Owner(name=file if ask_line else "KeyError"),),
    )


def _diff(random: Random, size: int) -> Lookup:
    lines: list[str] = []
    constants: dict[str, list[tuple[str, str, str]]] = {}
    while sum(map(len, lines)) < size:
        file = f"services/{random.choice(_SERVICES)}/{_name(random)}_{_hex(random, 2)}.py"
        if file in constants:
            continue
        constants[file] = []
        lines += [f"diff --git a/{file} b/{file}", f"index {_hex(random, 7)}..{_hex(random, 7)} 100644"]
        lines += [f"--- a/{file}", f"+++ b/{file}"]
        for _ in range(random.randrange(1, 4)):
            start = random.randrange(1, 400)
            lines += [f"@@ -{start},6 +{start},6 @@ def {_name(random)}(self):"]
            lines += [f"     {random.choice(_NOUNS)} = {_name(random)}({random.choice(_NOUNS)})" for _ in range(2)]
            constant = f"{random.choice(_VERBS)}_{random.choice(_NOUNS)}_limit".upper()
            old, new = (str(random.randrange(10, 9_999)) for _ in range(2))
            lines += [f"-    {constant} = {old}", f"+    {constant} = {new}"]
            lines += [f"     return {random.choice(_NOUNS)}.{random.choice(_VERBS)}({random.choice(_NOUNS)})"]
            constants[file].append((constant, old, new))
    file = random.choice([*constants][len(constants) // 4 :])
    constant, _, new = random.choice(constants[file])
    return Lookup(
        kind="diff",
        text="\n".join(lines),
        question=f"To which value does the change set {constant} in {file}?",
        answer=f"+    {constant} = {new}",
        owners=(Owner(name=file, rivals=tuple(other for other in constants if other != file)),),
    )


def _table(random: Random, size: int) -> Lookup:
    columns = ("order", "customer", "carrier", "weight_kg", "status", "tracking")
    rows: list[tuple[str, ...]] = []
    while 70 * len(rows) < size:
        customer = f"{random.choice(_SERVICES).title()} {random.choice(_NOUNS).title()} {random.randrange(10, 99)}"
        rows.append(
            (
                f"SO-{random.randrange(100_000, 999_999)}",
                customer,
                random.choice(("Northline", "Quickship", "Seaway", "Trailhead")),
                f"{random.randrange(1, 900) / 10}",
                random.choice(("packed", "shipped", "delivered", "held")),
                f"TR{random.randrange(10**8, 10**9)}",
            )
        )
    row = random.choice(rows[len(rows) // 8 :])
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ("---",) * len(columns), *rows))
    return Lookup(
        kind="table",
        text=text,
        question=f"What is the tracking number of order {row[0]}?",
        answer=row[-1],
        owners=(Owner(name=row[0], rivals=tuple(other[0] for other in rows if other is not row)),),
    )


def _listing(random: Random, size: int) -> Lookup:
    lines: list[str] = []
    matches: list[tuple[str, int, str, str]] = []
    while sum(map(len, lines)) < size:
        folder = f"src/{random.choice(_SERVICES)}/{random.choice(_NOUNS)}_{_hex(random, 2)}"
        lines += [f"{folder}:", f"total {random.randrange(8, 900)}"]
        for _ in range(random.randrange(4, 10)):
            day = f"{random.choice(('Jan', 'Feb', 'Mar'))} {random.randrange(1, 29):2} 09:{random.randrange(60):02}"
            file = f"{_name(random)}{random.choice(('.py', '.toml', '.sql', '.md'))}"
            lines.append(f"-rw-r--r-- 1 app app {random.randrange(100, 99_999):6} {day} {file}")
        lines.append("")
        file = f"{folder}/{_name(random)}.py"
        for _ in range(random.randrange(1, 4)):
            setting, value = f"{_name(random)}_{random.choice(('ttl', 'max', 'path', 'key'))}", _hex(random, 6)
            matches.append((file, random.randrange(1, 900), setting, value))
            lines.append(f'{file}:{matches[-1][1]}:    {setting} = os.environ.get("{setting.upper()}", "{value}")')
        lines.append("")
    file, _, setting, value = random.choice(matches[len(matches) // 8 :])
    return Lookup(
        kind="listing",
        text="\n".join(lines),
        question=f"What is the default value of {setting} in {file}?",
        answer=value,
        owners=(
            Owner(name=file, rivals=tuple({other for other, *_ in matches if other != file})),
            Owner(name=setting, rivals=tuple({other for *_, other, _ in matches if other != setting})),
        ),
    )


KINDS: dict[str, Callable[[Random, int], Lookup]] = {
    "log": _log,
    "json": _json,
    "trace": _trace,
    "diff": _diff,
    "table": _table,
    "listing": _listing,
}
