"""Typed configuration: dataclass defaults < YAML file < ``key=value`` overrides."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from terselm.errors import ConfigError

C = TypeVar("C")


def load_config(schema: type[C], path: Path | None = None, overrides: Sequence[str] = ()) -> C:
    """Build ``schema`` (a dataclass, possibly nested) from its defaults, a YAML file and ``key=value`` strings.

    Raises:
        ConfigError: no such file, broken YAML, an unknown key (the nearest known one is named), a value of the wrong
            type, or one that the dataclass itself refuses.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    layers = []
    try:
        if path is not None:
            layers.append(OmegaConf.load(path))
    except FileNotFoundError:
        raise ConfigError(f"no config file at {path}") from None
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: {_one_line(error)}") from None
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override {override!r} is not of the form key=value")
        try:
            layers.append(OmegaConf.from_dotlist([override]))
        except (YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"override {override!r}: {_one_line(error)}") from None
    for layer in layers:
        values = OmegaConf.to_container(layer)
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: expected a mapping of settings, got {type(values).__name__}")
        _check_keys(schema, cast("dict[str, Any]", values), prefix="")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), *layers)
        return cast(C, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        cause = error.__cause__ if isinstance(error.__cause__, ConfigError) else error
        key = getattr(error, "full_key", None)
        raise ConfigError(f"{key}: {_one_line(cause)}" if key and cause is error else _one_line(cause)) from None


def refuse(faults: Iterable[str]) -> None:
    """Raise one error that names all faults of some settings; nothing where there are none.

    Raises:
        ConfigError: there is a fault.
    """
    if named := list(faults):
        raise ConfigError("; ".join(named))


def dump_config(config: Any) -> str:
    """The resolved configuration as YAML, such as ``load_config`` reads back."""
    import yaml

    return yaml.safe_dump(_plain(asdict(config)), sort_keys=False, allow_unicode=True)


def _plain(value: Any) -> Any:
    """Settings as YAML knows them: what is written is what a user would write."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, StrEnum | Path) else value


def _check_keys(schema: type[Any], values: dict[str, Any], prefix: str) -> None:
    hints = get_type_hints(schema)
    names = [field.name for field in fields(schema)]
    for key, value in values.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known keys: {', '.join(prefix + n for n in names)}"
            raise ConfigError(f"unknown config key {prefix}{key}; {hint}")
        if _is_enum(hints[key]) and value not in [*hints[key], *hints[key].__members__]:
            raise ConfigError(f"{prefix}{key} is {value!r}; expected one of {', '.join(hints[key])}")
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"{prefix}{key} is {value!r}; expected a mapping of settings")
            _check_keys(cast("type[Any]", hints[key]), value, prefix=f"{prefix}{key}.")


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, StrEnum)


def _one_line(error: BaseException) -> str:
    from yaml import MarkedYAMLError

    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} (line {error.problem_mark.line + 1})"
    return " ".join(str(error).split("\n")[0].split())
