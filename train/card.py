"""The model card of a published checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from terselm.models import ALIASES
from terselm.train.report.measures import summary

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

_BODY = """\
# {name}

`{base}`, aligned with TerseLM to the output of {targets}. It is a small language model \
for *compressing prompts*: it judges which tokens the target would find surprising. It is not meant to answer.

```python
from terselm import PromptCompressor

compressor = PromptCompressor.from_pretrained("{address}")
print(compressor.compress(instruction="…", demonstrations=["…"], question="…", budget=200).text)
```

{kind}
{use}
## How well it predicts the target

Held-out responses ({scored[records]} to {scored[prompts]} prompts that it was not trained on, {scored[bytes]:,} bytes):

| | before | after | difference (95% interval) |
|---|---|---|---|
| bits per byte | {scored[before][bits_per_byte]:.4f} | {scored[after][bits_per_byte]:.4f} \
| {change[bits_per_byte]:+.4f} ({low:+.4f} to {high:+.4f}) |
| nats per token | {scored[before][nll_per_token]:.4f} | {scored[after][nll_per_token]:.4f} \
| {change[nll_per_token]:+.4f} |

The interval is a paired bootstrap over prompts. {verdict}
{words}
## How it was made

{method} on {data[training_records]:,} records ({training[tokens_seen]:,} tokens seen in {training[steps]} \
steps){merged}. `config.yaml` holds every setting, `metrics.json` the loss history, `provenance.json` the hashes of \
base, data and files, versions and hardware.

## Limits and licence

It inherits the abilities, faults and licence of its base{licence}. It was trained on text that {targets} wrote; the \
terms of that model may bind whoever passes this one on.
"""


_METHODS = {"lora": "LoRA", "qlora": "LoRA over weights of 4 bits", "full": "All weights trained"}
_MERGED = "It is a plain `transformers` checkpoint: `AutoModelForCausalLM.from_pretrained` loads it too."
_ADAPTER = (
    "It is an adapter in PEFT's format, without its base: TerseLM loads the base by the name above and merges both."
)

_USE = """
## What it is for

Aligned for use: utility of each sentence or line of a prompt{target}. `utility_head.safetensors` scores them all in \
one pass over question and prompt. That is what TerseLM takes documents, tool output and chats with a question by; \
`rank_by=utility` asks for it, with a question or without. For worked examples it compresses by surprisal.
"""

_WORDS = """
## How much it agrees with the target

{summary}

![The report as plots](report.png)
"""


def model_card(
    name: str,
    base: str,
    metrics: dict[str, Any],
    report: dict[str, Any] | None = None,
    *,
    adapter_only: bool = False,
    utility: Mapping[str, str] | None = None,
) -> str:
    """Markdown with YAML metadata as the Hugging Face hub reads it.

    Args:
        name: of the published folder, or its address on the hub.
        base: the model that was aligned, as the run named it.
        metrics: what the run measured.
        report: the alignment report, if it compared words with a target.
        adapter_only: the folder holds no base.
        utility: the facts of its utility head, if it has one.
    """
    from huggingface_hub import ModelCardData

    held_out = metrics["held_out"]
    low, high = held_out["difference"]["bits_per_byte_interval"]
    license_id = _license(base)
    method = metrics.get("method", "lora")
    data = ModelCardData(
        base_model=ALIASES[base].base if base in ALIASES else base,
        license=license_id,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["terselm", "prompt-compression", *([] if method == "full" else [method]), *_tags_of(utility)],
        model_name=name.split("/")[-1],
        eval_results=[_result(metrics)],
    )
    body = _BODY.format(
        name=name.split("/")[-1],
        address=name if "/" in name else f"path/to/{name}",
        method=_METHODS[method],
        merged="" if adapter_only or method == "full" else ", merged in float32",
        kind=_ADAPTER if adapter_only else _MERGED,
        use="" if utility is None else _USE.format(target=_reader(utility)),
        base=base,
        targets=", ".join(f"`{target}`" for target in metrics["data"]["targets"]) or "an unnamed model",
        scored=held_out,
        change=held_out["difference"],
        data=metrics["data"],
        training=metrics["training"],
        low=low,
        high=high,
        verdict=_verdict(low, high),
        words=_WORDS.format(summary=summary(report)) if report is not None and report["words"] is not None else "",
        licence=f" ({license_id})" if license_id else "",
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _tags_of(utility: Mapping[str, str] | None) -> list[str]:
    return [] if utility is None else ["utility"]


def _reader(utility: Mapping[str, str]) -> str:
    """For whose answers the units are useful, where the head says so."""
    return f" for the answers of `{utility['target']}`" if utility.get("target") else ""


def _result(metrics: dict[str, Any]) -> EvalResult:
    from huggingface_hub import EvalResult

    held_out = metrics["held_out"]
    return EvalResult(
        task_type="text-generation",
        dataset_type="records",
        dataset_name=f"held-out responses of {Path(metrics['data']['records']).name}",
        metric_type="bits_per_byte",
        metric_name="bits per byte",
        metric_value=held_out["after"]["bits_per_byte"],
        metric_args={
            "before": held_out["before"]["bits_per_byte"],
            "difference": held_out["difference"]["bits_per_byte"],
            "difference_interval": held_out["difference"]["bits_per_byte_interval"],
            "confidence": held_out["difference"]["confidence"],
        },
    )


def _verdict(low: float, high: float) -> str:
    if high < 0:
        return "The aligned model predicts the target better."
    if low > 0:
        return "**The aligned model predicts the target worse.**"
    return "**No difference was shown**: the interval holds zero."


def _license(base: str) -> str | None:
    """SPDX id of the base's licence where it is known."""
    if base in ALIASES:
        return ALIASES[base].license
    from huggingface_hub import ModelCard

    card = Path(base).expanduser() / "README.md"
    if not card.is_file():
        return None
    try:
        licence = ModelCard.load(card).data.get("license")
    except ValueError:  # a card without readable metadata
        return None
    return str(licence) if licence else None
