"""One door to every causal LM: aliases, folders, runs, adapters, GGUF files, hub ids."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from terselm.errors import CheckpointError, ConfigError, ModelError
from terselm.extras import first_line, need
from terselm.models.aliases import ALIASES, convert_alias
from terselm.models.quantise import quantise_linear_layers

if TYPE_CHECKING:
    from terselm.models.utility_head import UtilityHead

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_INT8 = "int8"
_DTYPES = ("auto", "float32", "bfloat16", "float16", _INT8)


@dataclass(frozen=True, kw_only=True)
class CausalLM:
    """A causal LM with its tokenizer.

    Attributes:
        model: a transformers model in eval mode.
        tokenizer: a fast tokenizer (character offsets are needed).
        name: the name under which it was asked for.
        first_id: the token that every text starts with, where that is not BOS: a chat template may open with another.
        utility: the head that scores units of prompts, on the model's device; None where it was not aligned for use.
    """

    model: Any
    tokenizer: Any
    name: str
    first_id: int | None = None
    utility: UtilityHead | None = None

    @property
    def window(self) -> int:
        """The most tokens that the model reads at once."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @property
    def start_id(self) -> int:
        """The token every text starts with: by default BOS, or end-of-text for a model that has none.

        Raises:
            ModelError: the tokenizer has neither.
        """
        for token in (self.first_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ModelError(f"the tokenizer of {self.name!r} has neither a BOS nor an end-of-text token")


def load_causal_lm(name: str | Path, *, device: str = "auto", dtype: str = "auto") -> CausalLM:
    """Load a causal LM and its tokenizer.

    Remote code is never run and pickled weights are never read.

    Args:
        name: an alias (``smollm2-135m``), a model folder, a run folder, an adapter folder (merged into its base), a
            ``.gguf`` file, or a hub id.
        device: ``auto`` (CUDA, else MPS, else CPU) or any torch device.
        dtype: ``auto`` (float32 on the CPU, bfloat16 elsewhere), ``float32``, ``bfloat16``, ``float16``, or ``int8``,
            for CPUs alone: see `quantise_linear_layers`.

    Raises:
        ModelError: there is no such model, or it cannot be loaded.
        CheckpointError: a folder without a usable model or adapter.
        ConfigError: an unknown device or dtype, or int8 on another device than the CPU.
    """
    import torch

    if dtype not in _DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; expected one of {', '.join(_DTYPES)}")
    place = pick_device(device)
    if dtype == "auto":
        dtype = "float32" if place.type == "cpu" else "bfloat16"
    if dtype == _INT8 and place.type != "cpu":
        raise ConfigError(f"dtype int8 is for the CPU, but the device is {place}; choose device cpu, or another dtype")
    model, tokenizer = _load(name, torch.float32 if dtype == _INT8 else getattr(torch, dtype))
    head = _utility_head(name, model)
    if not tokenizer.is_fast:
        raise ModelError(f"{str(name)!r} has no fast tokenizer; TerseLM needs its character offsets")
    if dtype == _INT8:
        model = quantise_linear_layers(model, tokenizer)
    try:
        utility = head.to(place).eval() if head is not None else None
        return CausalLM(model=model.to(place).eval(), tokenizer=tokenizer, name=str(name), utility=utility)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"cannot move {str(name)!r} to device {device!r}: {first_line(error)}") from None


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of any model that `load_causal_lm` takes; reads no weights but those of a new alias or GGUF."""
    from transformers import AutoTokenizer

    source = resolve(name)
    if adapter := adapter_folder(source):
        source = resolve(_adapter_base(adapter))
    with _clear_errors(name):
        if str(source).endswith(".gguf"):
            return AutoTokenizer.from_pretrained(Path(source).parent, gguf_file=Path(source).name)
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def pick_device(device: str) -> Any:
    """``auto`` or a torch device string, as a ``torch.device``."""
    import torch

    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device(accelerator.type) if accelerator is not None else torch.device("cpu")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {device!r}: {first_line(error)}") from None


def resolve(name: str | Path) -> Path | str:
    """A local path for an alias, a folder or a GGUF file; a hub id as it is, or its download while the hub is away.

    For a run folder that holds a whole model it is that model's.

    Raises:
        ModelError: a path that does not exist; an alias whose package is missing.
    """
    if str(name) in ALIASES:
        return convert_alias(str(name))
    path = Path(name).expanduser()
    if path.exists():
        return path / "model" if (path / "model" / "config.json").is_file() else path
    text = str(name)
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1 or text.endswith("/"):
        raise ModelError(f"no model at {text}; expected a folder with config.json, a run folder or an adapter")
    if not text.strip():
        raise ModelError("the model name is empty; expected an alias, a folder or a hub id")
    return text if _hub_answers() else _downloaded(text)


def adapter_folder(source: Path | str) -> Path | None:
    """The adapter in a run folder or adapter folder; None for a model that stands by itself.

    Raises:
        CheckpointError: a folder that holds neither a model nor an adapter, or whose weights are pickled.
    """
    if not isinstance(source, Path) or source.is_file():
        return None
    for folder in (source / "adapter", source):
        if (folder / ADAPTER_CONFIG).is_file():
            if not (folder / _ADAPTER_WEIGHTS).is_file():
                raise CheckpointError(f"adapter {folder} holds no {_ADAPTER_WEIGHTS}; pickled weights are not read")
            return folder
    if (source / "config.json").is_file():
        return None
    if (source / "config.yaml").is_file() or (source / "checkpoints").is_dir():
        raise CheckpointError(f"run folder {source} holds no adapter: training has not finished; run it again")
    raise CheckpointError(f"folder {source} holds neither a model (config.json) nor an adapter ({ADAPTER_CONFIG})")


def _load(name: str | Path, dtype: Any) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    source = resolve(name)
    adapter = adapter_folder(source)
    if adapter is not None:
        base, tokenizer = _load(_adapter_base(adapter), torch.float32)
        return _merge(base, adapter).to(dtype), tokenizer
    where: Path | str = source
    options: dict[str, Any] = {"use_safetensors": True, "trust_remote_code": False}
    if isinstance(source, Path) and source.is_file():
        where, options = source.parent, {"gguf_file": source.name}
    with _clear_errors(name):
        model = AutoModelForCausalLM.from_pretrained(where, dtype=dtype, **options)
    return model, load_tokenizer(name)


def _utility_head(name: str | Path, model: Any) -> UtilityHead | None:
    """What lies beside the weights that were named; a head of an adapter's base is for other states.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    from terselm.models.utility_head import HEAD_WEIGHTS, UtilityHead

    source = resolve(name)
    adapter = adapter_folder(source)
    folder = adapter or (source if isinstance(source, Path) else _hub_folder_with(source, HEAD_WEIGHTS))
    if folder is None or not (folder / HEAD_WEIGHTS).is_file():
        return None
    base = _published_base(folder) if adapter is None else _adapter_base(adapter)
    return UtilityHead.load(folder, int(model.config.get_text_config().hidden_size), base=base)


def _hub_folder_with(hub_id: str, file: str) -> Path | None:
    """The folder of a hub model's downloaded files, once this one is among them; None where the model has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with _clear_errors(hub_id):
        try:
            return Path(hf_hub_download(hub_id, file)).parent
        except LocalEntryNotFoundError:  # the hub does not answer any more
            raise
        except EntryNotFoundError:
            return None


def _published_base(folder: Path) -> str | None:
    """What a published model was made from."""
    import json

    try:
        return str(json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["base"]["name"])
    except (OSError, ValueError, KeyError, TypeError):  # `verify` is who says that it is damaged
        return None


def _adapter_base(adapter: Path) -> str:
    import json

    try:
        base = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except ValueError:
        raise CheckpointError(f"{adapter / ADAPTER_CONFIG} is not JSON; the adapter is damaged") from None
    if not base:
        raise CheckpointError(f"{adapter / ADAPTER_CONFIG} does not name its base model")
    return str(base)


def _merge(base: Any, adapter: Path) -> Any:
    from safetensors import SafetensorError

    peft = need("peft", "train")
    try:
        return peft.PeftModel.from_pretrained(base, adapter, use_safetensors=True).merge_and_unload()
    except (RuntimeError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"adapter {adapter} does not fit its base model: {first_line(error)}") from None


@cache
def _hub_answers() -> bool:
    """Whether the hub can be reached at all: to find that out by asking it for files takes its client minutes."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # of whichever HTTP library the hub's client is built on
        return False
    return True


def _downloaded(hub_id: str) -> Path:
    """The folder of a hub model that was downloaded before."""
    from huggingface_hub import snapshot_download

    with _clear_errors(hub_id):
        return Path(snapshot_download(hub_id, local_files_only=True))


@contextmanager
def _clear_errors(name: str | Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except ModelError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError) as error:
        if Path(name).expanduser().exists() or str(name) in ALIASES:
            raise CheckpointError(f"cannot load {name}: {first_line(error)}") from None
        near = difflib.get_close_matches(str(name), ALIASES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"aliases: {', '.join(ALIASES)}"
        raise ModelError(
            f"no model {str(name)!r}: neither an alias nor a folder, and the hub did not give it ({hint})"
        ) from None
