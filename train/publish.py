"""Turn a finished run into a checkpoint that stands by itself: a folder, or one commit and one tag on the hub."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from terselm.errors import CheckpointError, ConfigError
from terselm.extras import first_line
from terselm.files import atomic_folder, remove_partials
from terselm.models import CausalLM, load_causal_lm
from terselm.models.utility_head import HEAD_WEIGHTS, UtilityHead
from terselm.train.card import model_card
from terselm.train.hardware import quieten_libraries
from terselm.train.provenance import (
    combined_sha256,
    describe_hardware,
    describe_versions,
    folder_sha256,
    git_commit,
    read_json,
    weights_sha256,
)
from terselm.train.report.report import PAGE, REPORT, read_report
from terselm.train.run_folder import MODEL, finished_result
from terselm.train.settings import Precision
from terselm.train.verify import (
    KEPT_REFERENCE,
    PROVENANCE,
    TOLERANCE,
    Differences,
    check_logits,
    probe,
    utility_scores,
    write_references,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HUB_PREFIX = "hub:"
_SHARD = "5GB"  # of a weights file, at most
_KEPT = (".gitattributes",)  # the hub's own file


@dataclass(frozen=True, kw_only=True)
class PublishedCheckpoint:
    """A published folder.

    Attributes:
        path: where it is.
        base: the model that was aligned, as the run named it.
        dtype: number format of its weights.
        logit_difference: from the base with its adapter, measured in a fresh process; root mean square, as a share of
            the logits' spread.
    """

    path: Path
    base: str
    dtype: str
    logit_difference: float


@dataclass(frozen=True, kw_only=True)
class Form:
    """What is published.

    Attributes:
        dtype: of the stored weights. The merge is always in float32, and float32 is the default: an adapter changes
            most weights by less than bfloat16 can hold, and on a CPU it is the format that runs everywhere.
        adapter_only: the adapter without its base, which whoever loads it then needs, too.
        address: what to load it by, for the card.
    """

    dtype: Precision = Precision.FLOAT32
    adapter_only: bool = False
    address: str | None = None

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype is Precision.BFLOAT16 and not self.adapter_only else torch.float32


@dataclass(frozen=True, kw_only=True)
class HubPlace:
    """Where on the hub.

    Attributes:
        repo: ``organisation/name``.
        tag: of the commit; None takes one from the adapter's digest.
        private: whether a new repository can be seen by its owners alone.

    Raises:
        ConfigError: the name is not of that form.
    """

    repo: str
    tag: str | None = None
    private: bool = True

    def __post_init__(self) -> None:
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils._validators import validate_repo_id

        try:
            validate_repo_id(self.repo)
        except HFValidationError:
            raise ConfigError(f"{self.repo!r} is no name on the hub; expected hub:ORGANISATION/NAME") from None
        if "/" not in self.repo:
            raise ConfigError(f"{self.repo!r} names no owner; expected hub:ORGANISATION/NAME")


def publish(run: Path, to: Path, form: Form | None = None) -> PublishedCheckpoint:
    """Write a folder that `transformers` loads without TerseLM: a run's adapter, merged into its base, or its model.

    The folder appears under its name only after a fresh process has loaded it and found the logits of the base with
    its adapter.

    Args:
        run: a finished run folder.
        to: the folder to make; it must not exist.
        form: of what is written.

    Raises:
        CheckpointError: the run is not finished or damaged, its base is not the one that it was trained on, ``to``
            exists, or the copy does not give the same logits.
        ModelError: the base cannot be loaded.
    """
    quieten_libraries()
    form = form or Form()
    trained = finished_result(run)
    if form.adapter_only and trained.name == MODEL:
        raise CheckpointError(f"run folder {run} holds no adapter, since all of its weights were trained")
    with _only_writer(to):
        metrics = read_json(run / "metrics.json")
        base, origin = _load_base(trained, metrics)
        with atomic_folder(to) as partial, tempfile.TemporaryDirectory() as scratch:
            reference = Path(scratch) / "reference.safetensors"
            head = _utility_head(base, trained)
            _write_weights(base, trained, head, form, partial, reference)
            found = check_logits(partial, reference, form.torch_dtype)
            for name in ("config.yaml", "metrics.json", *(page for page in (REPORT, PAGE) if (run / page).is_file())):
                shutil.copyfile(run / name, partial / name)
            name, report = form.address or to.name, read_report(run)
            utility = head.facts if head is not None else None
            card = model_card(name, base.name, metrics, report, adapter_only=form.adapter_only, utility=utility)
            (partial / "README.md").write_text(card, encoding="utf-8")
            provenance = _provenance(metrics, origin, trained, form, found)
            provenance["sha256"] = folder_sha256(partial, leave_out=PROVENANCE)
            text = json.dumps(provenance, indent=2, ensure_ascii=False) + "\n"
            (partial / PROVENANCE).write_text(text, encoding="utf-8")
    return PublishedCheckpoint(
        path=to, base=base.name, dtype=str(form.torch_dtype).removeprefix("torch."), logit_difference=found.logits
    )


def publish_to_hub(run: Path, place: HubPlace, form: Form | None = None) -> str:
    """Publish to a folder that is thrown away, then put that on the hub; the commit's address.

    Raises:
        ConfigError: there is no token.
        CheckpointError: as `publish`, or the hub is out of reach, refuses, or has the tag already.
    """
    with _clear_hub_errors(f"cannot publish to {place.repo}"):
        _api().whoami()  # better to know now than after the work
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / place.repo.split("/")[1]
        publish(run, folder, replace(form or Form(), address=place.repo))
        digest = read_json(folder / PROVENANCE)["trained_sha256"]
        return upload(folder, place, default_tag=f"run-{digest[:12]}")


def upload(folder: Path, place: HubPlace, *, default_tag: str) -> str:
    """Make the repository hold exactly what the folder holds, in one commit with a tag; the commit's address.

    All files are sent before the commit is made, so a fault on the way changes nothing that anybody can see; an empty
    new repository may be left.

    Raises:
        CheckpointError: the hub is out of reach, refuses, or has the tag already.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    api, tag = _api(), place.tag or default_tag
    with _clear_hub_errors(f"{place.repo} was left as it was"):
        api.create_repo(place.repo, private=place.private, exist_ok=True)
        if any(known.name == tag for known in api.list_repo_refs(place.repo).tags):
            raise CheckpointError(
                f"{place.repo} has a tag {tag} already: this was published before; choose another --tag"
            )
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        old = [name for name in api.list_repo_files(place.repo) if name not in (*files, *_KEPT)]
        commit = api.create_commit(
            place.repo,
            [
                *(CommitOperationAdd(name, str(path)) for name, path in files.items()),
                *(CommitOperationDelete(name) for name in old),
            ],
            commit_message=f"Publish {tag} with TerseLM",
        )
    with _clear_hub_errors(f"{place.repo} holds the files in commit {commit.oid}, but without the tag {tag}"):
        api.create_tag(place.repo, tag=tag, revision=commit.oid)
    return str(commit.commit_url)


def _load_base(trained: Path, metrics: dict[str, Any]) -> tuple[CausalLM, dict[str, Any]]:
    """The base in float32, and where it is from.

    Raises:
        CheckpointError: its weights are not those that the adapter was trained on.
    """
    adapter = trained / "adapter_config.json"
    name = str(read_json(adapter)["base_model_name_or_path"] if adapter.is_file() else metrics["model"])
    base = load_causal_lm(name, device="cpu", dtype="float32")
    trained_on = metrics.get("base") or {}
    digest = trained_on.get("weights_sha256")
    if digest is not None and weights_sha256(base.model, getattr(torch, trained_on["dtype"])) != digest:
        raise CheckpointError(
            f"{trained} was trained on another base: {name!r} has other weights now; publish with the weights it was "
            "trained on, or run the alignment again"
        )
    revision = getattr(base.model.config, "_commit_hash", None)  # of the hub; a local one has none
    origin = {"name": name, "revision": revision or None, "weights_sha256": weights_sha256(base.model)}
    return base, origin


@contextmanager
def _only_writer(to: Path) -> Iterator[None]:
    """Refuse an existing target and a second writer; clear away what a killed one left."""
    from filelock import FileLock, Timeout

    if to.exists():
        raise CheckpointError(f"{to} exists; publish to a new folder or remove it first")
    name = hashlib.sha256(str(to.absolute()).encode()).hexdigest()[:16]
    try:
        with FileLock(Path(tempfile.gettempdir()) / f"terselm-publish-{name}.lock", timeout=0):
            remove_partials(to)
            yield
    except Timeout:
        raise CheckpointError(f"another process is publishing to {to}; wait for it") from None
    except KeyError as missing:
        raise CheckpointError(f"the run's metrics.json lacks {missing}; run the alignment again") from None
    except OSError as error:
        raise CheckpointError(f"cannot publish to {to}: {first_line(error)}; nothing is left there") from None


def _utility_head(base: CausalLM, trained: Path) -> UtilityHead | None:
    """The head that was trained along, if one was."""
    if not (trained / HEAD_WEIGHTS).is_file():
        return None
    return UtilityHead.load(trained, int(base.model.config.get_text_config().hidden_size), base=base.name)


def _write_weights(
    base: CausalLM, trained: Path, head: UtilityHead | None, form: Form, folder: Path, reference: Path
) -> None:
    model = _trained_model(base, trained)
    ids = probe(base.tokenizer, model.config.vocab_size)
    scores = utility_scores(model, head, ids) if head is not None else None
    with torch.inference_mode():
        write_references(ids, model(input_ids=ids).logits, scores, whole=reference, kept=folder / KEPT_REFERENCE)
    if head is not None:
        shutil.copyfile(trained / HEAD_WEIGHTS, folder / HEAD_WEIGHTS)
    if form.adapter_only:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(trained / name, folder / name)
        return
    whole = model if trained.name == MODEL else model.merge_and_unload()
    whole.to(form.torch_dtype).save_pretrained(folder, max_shard_size=_SHARD)
    base.tokenizer.save_pretrained(folder)


def _trained_model(base: CausalLM, trained: Path) -> Any:
    """In float32; an adapter stays apart from its base."""
    if trained.name == MODEL:
        return load_causal_lm(trained, device="cpu", dtype="float32").model
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        return PeftModel.from_pretrained(base.model, trained, use_safetensors=True).eval()
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"adapter {trained} does not fit its base {base.name!r}: {first_line(error)}") from None


def _provenance(
    metrics: dict[str, Any], origin: dict[str, Any], trained: Path, form: Form, found: Differences
) -> dict[str, Any]:
    utility = {} if found.utility is None else {"utility_difference": found.utility}
    return {
        "base": origin,
        "trained_sha256": combined_sha256(trained),
        "data": metrics["data"],
        "weights": {
            "merged_in": None if form.adapter_only or trained.name == MODEL else "float32",
            "stored_in": str(form.torch_dtype).removeprefix("torch."),
            "logit_difference": found.logits,
            "tolerance": TOLERANCE[form.torch_dtype],
            **utility,
        },
        "trained_with": {name: metrics[name] for name in ("versions", "hardware", "git_commit", "compute")},
        "published_with": {
            "versions": describe_versions(),
            "hardware": describe_hardware(),
            "git_commit": git_commit(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }


def _api() -> HfApi:
    from huggingface_hub import HfApi, constants, get_token

    if get_token() is None:
        raise ConfigError("publishing to the hub needs a token that may write; set HF_TOKEN")
    return HfApi(endpoint=constants.ENDPOINT, library_name="terselm")


@contextmanager
def _clear_hub_errors(consequence: str) -> Iterator[None]:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        reason = f"the hub answered {status}"
        if status in (401, 403):
            reason = f"the hub refused the token ({status}): it must be valid and may write there"
        raise CheckpointError(f"{reason}; {consequence}") from None
    except _transport_errors() as error:
        raise CheckpointError(
            f"the hub at {constants.ENDPOINT} cannot be reached ({first_line(error)}); {consequence}"
        ) from None


def _transport_errors() -> tuple[type[Exception], ...]:
    """What the hub's client raises for a broken line; it speaks HTTP through httpx in its version 1, httpx2 in 2."""
    libraries = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    return (OSError, RuntimeError, *(library.HTTPError for library in libraries))
