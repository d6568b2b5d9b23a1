"""The table."""

from __future__ import annotations

from statistics import median
from typing import Any

_KINDS = {"cold": "batch 1, cold", "warm": "batch 1, same demonstrations", "batch": "batch"}


def ratios(sides: dict[str, Any]) -> dict[str, dict[str, float]]:
    """How many times faster the first side is: median, least and most of the pairs that were run in turns."""
    one, other = sides.values()
    found = {}
    for kind in _KINDS:
        pairs = zip(one[kind]["all_seconds"], other[kind]["all_seconds"], strict=True)
        quotients = [theirs / ours for ours, theirs in pairs]
        found[kind] = {"median": median(quotients), "least": min(quotients), "most": max(quotients)}
    return found


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    prompts, sides = result["prompts"], result["sides"]
    names = list(sides)
    lines = [
        f"{result['model']['name']}, {_dtypes(result['model'])}, on {_hardware(result['hardware'])}; prompts of "
        f"{prompts['tokens']:,.0f} tokens with {prompts['demonstrations']:.0f} demonstrations ({result['source']}), "
        f"budget {prompts['budget']}",
        "",
        f"| | {' | '.join(names)} | times faster |",
        "|---|" + "---:|" * (len(names) + 1),
    ]
    for kind, title in _KINDS.items():
        title = f"batch {prompts['batch']}" if kind == "batch" else title
        ratio = result["ratios"][kind]
        faster = f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"
        lines.append(_row(f"{title}: seconds", [f"{sides[n][kind]['seconds']:.3f}" for n in names], faster))
        lines.append(_row("— of processor time", [f"{sides[n][kind]['processor_seconds']:.3f}" for n in names]))
        lines.append(_row("— forward passes", [f"{sides[n][kind]['passes']:,.0f}" for n in names]))
        lines.append(_row("— tokens forwarded", [f"{sides[n][kind]['forwarded']:,.0f}" for n in names]))
        lines.append(_row("— compressed to, tokens", [f"{sides[n][kind]['compressed_tokens']:,.0f}" for n in names]))
        lines.append(_row("— peak above weights, MiB", [_mebibytes(sides[n][kind]["peak_bytes"]) for n in names]))
    rates = [f"{sides[n]['batch']['tokens_per_second']:,.0f}" for n in names]
    lines.append(_row("— prompt tokens a second", rates))
    lines.append(_row("— share of the ceiling", [f"{sides[n]['batch']['share_of_ceiling']:.0%}" for n in names]))
    lines.append(_row("first call: seconds", [f"{sides[n]['first_call_seconds']:.3f}" for n in names]))
    ceiling = result["ceiling"]["tokens_per_second"]
    return "\n".join([*lines, "", f"The ceiling, plain batched scoring of these prompts: {ceiling:,.0f} tokens/s"])


def _dtypes(model: dict[str, str]) -> str:
    own, peer = model["own_dtype"], model["dtype"]
    return own if own == peer else f"{own} against {peer}"


def _row(title: str, cells: list[str], last: str = "") -> str:
    return f"| {title} | {' | '.join(cells)} | {last} |"


def _mebibytes(value: int | None) -> str:
    return "not seen" if value is None else f"{value / (1 << 20):,.0f}"


def _hardware(hardware: dict[str, Any]) -> str:
    return ", ".join(hardware["gpus"]) or f"{hardware['cores']} cores of {hardware['cpu']}"
