"""Typed configuration: dataclass defaults < YAML file < ``key=value`` overrides."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

from terselm.errors import ConfigError

C = TypeVar("C")


def load_config(schema: type[C], path: Path | None = None, overrides: Sequence[str] = ()) -> C:
    """Build ``schema`` (a dataclass, possibly nested) from its defaults, a YAML file and ``key=value`` strings.

    Raises:
        ConfigError: no such file, broken YAML, unknown keys (the nearest known ones are named), values of the wrong
            type, or such as the dataclasses themselves refuse. All that is wrong is named at once.
    """
    from omegaconf import OmegaConf

    faults: list[str] = []
    merged = OmegaConf.structured(schema)
    for layer in _layers(path, overrides, faults):
        values = _known(schema, layer, _Keys(schema), faults, prefix="")
        merged = _merged(merged, values, faults)
    _made(merged, faults)
    refuse(dict.fromkeys(faults))
    return cast(C, OmegaConf.to_object(merged))


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


def _layers(path: Path | None, overrides: Sequence[str], faults: list[str]) -> Iterator[dict[Any, Any]]:
    """What the file and each override say, as plain mappings."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if path is not None:
        try:
            values = OmegaConf.to_container(OmegaConf.load(path))
        except FileNotFoundError:
            faults.append(f"no config file at {path}")
        except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
            faults.append(f"{path}: {_one_line(error)}")
        else:
            if isinstance(values, dict):
                yield values
            else:
                faults.append(f"{path}: expected a mapping of settings, got {type(values).__name__}")
    for override in overrides:
        if "=" not in override:
            faults.append(f"override {override!r} is not of the form key=value")
            continue
        try:
            yield cast("dict[Any, Any]", OmegaConf.to_container(OmegaConf.from_dotlist([override])))
        except (YAMLError, OmegaConfBaseException) as error:
            faults.append(f"override {override!r}: {_one_line(error)}")


class _Keys:
    """The keys of a schema, by which section they stand in."""

    def __init__(self, schema: type[Any]) -> None:
        self._of: dict[str, list[str]] = {}  # full names by last name
        self._collect(schema, "")

    def hint(self, key: str, prefix: str, names: Sequence[str]) -> str:
        """What the user may have meant by an unknown key of a section that has these names."""
        meant = self._of.get(key, [])
        if not meant:
            meant = [prefix + name for name in difflib.get_close_matches(key, names, n=1, cutoff=0.5)]
        if not meant:
            near = difflib.get_close_matches(key, self._of, n=1, cutoff=0.8)
            meant = [name for last in near for name in self._of[last]]
        if meant:
            return f"did you mean {' or '.join(meant)}?"
        return f"known keys: {', '.join(prefix + name for name in names)}"

    def _collect(self, schema: type[Any], prefix: str) -> None:
        hints = get_type_hints(schema)
        for field in fields(schema):
            self._of.setdefault(field.name, []).append(prefix + field.name)
            if is_dataclass(hints[field.name]):
                self._collect(cast("type[Any]", hints[field.name]), f"{prefix}{field.name}.")


def _known(schema: type[Any], values: dict[Any, Any], keys: _Keys, faults: list[str], *, prefix: str) -> dict[str, Any]:
    """The values whose keys the schema knows; of the others a fault is noted."""
    hints = get_type_hints(schema)
    names = [field.name for field in fields(schema)]
    known: dict[str, Any] = {}
    for key, value in values.items():
        if key not in names:
            faults.append(f"unknown config key {prefix}{key} ({keys.hint(str(key), prefix, names)})")
        elif _is_enum(hints[key]) and value not in [*hints[key], *hints[key].__members__]:
            faults.append(f"{prefix}{key} is {value!r}; expected one of {', '.join(hints[key])}")
        elif not is_dataclass(hints[key]):
            known[key] = value
        elif isinstance(value, dict):
            section = cast("type[Any]", hints[key])
            known[key] = _known(section, value, keys, faults, prefix=f"{prefix}{key}.")
        else:
            faults.append(f"{prefix}{key} is {value!r}; expected a mapping of settings")
    return known


def _merged(config: Any, values: dict[str, Any], faults: list[str]) -> Any:
    """The config with these values; one that does not fit its type is noted and left out, so that others are seen."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    while True:
        try:
            return OmegaConf.merge(config, OmegaConf.create(values))
        except OmegaConfBaseException as error:
            key = getattr(error, "full_key", None)
            faults.append(f"{key}: {_one_line(error)}" if key else _one_line(error))
            if not key or not _remove(values, key):
                return config


def _remove(values: dict[str, Any], key: str) -> bool:
    """Take a key such as ``train.steps`` or ``targets[0]`` out; False where it is not there."""
    section: Any = values
    *path, last = key.partition("[")[0].split(".")
    for name in path:
        section = section.get(name) if isinstance(section, dict) else None
    if not isinstance(section, dict) or last not in section:
        return False
    del section[last]
    return True


def _made(node: Any, faults: list[str]) -> Any:
    """What a node of the config stands for; notes what its dataclasses refuse.

    A dataclass that refuses itself is made all the same, so that those around it can be asked with the true values.
    """
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not isinstance(node, DictConfig):
        return OmegaConf.to_object(node) if OmegaConf.is_config(node) else node
    values = {}
    for key in node:
        try:
            values[key] = _made(node[key], faults)
        except OmegaConfBaseException as error:  # such as an interpolation of a key that is not there
            faults.append(f"{getattr(error, 'full_key', None) or str(key)}: {_one_line(error)}")
    kind = OmegaConf.get_type(node)
    if kind is None or not is_dataclass(kind) or len(values) < len(node):
        return values
    made = object.__new__(kind)
    for name, value in values.items():
        object.__setattr__(made, str(name), value)
    try:
        getattr(made, "__post_init__", lambda: None)()
    except ConfigError as error:
        faults.append(str(error))
    return made


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, StrEnum)


def _one_line(error: BaseException) -> str:
    from yaml import MarkedYAMLError

    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, MarkedYAMLError) and error.problem and error.problem_mark:
        return f"{error.problem} (line {error.problem_mark.line + 1})"
    return " ".join(str(error).split("\n")[0].split())
