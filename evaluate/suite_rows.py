"""Rows of a suite's data, each with where it stands."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from terselm.data.rows import read_rows
from terselm.errors import ConfigError, DataFormatError
from terselm.evaluate.settings import SuiteSettings


@dataclass(frozen=True, kw_only=True)
class SuiteRow:
    """A row of a data set.

    Attributes:
        where: the file and line, or the data set and row, for complaints.
        number: from 1, of the line or row.
    """

    where: str
    number: int
    values: dict[str, Any]

    def text(self, key: str) -> str:
        """The text under ``key``.

        Raises:
            ConfigError: there is none.
        """
        value = self.values.get(key)
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"{self.where}: expected a text under {key!r}, got {value!r}")
        return value

    def texts(self, key: str) -> list[str]:
        """The texts in the list under ``key``, at least one.

        Raises:
            ConfigError: there are none, or other things.
        """
        values = self.values.get(key)
        if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
            raise ConfigError(f"{self.where}: expected a list of texts under {key!r}, got {values!r}")
        return values


def suite_rows(path: Path | None, hub_id: str = "", config: str | None = None, split: str = "") -> list[SuiteRow]:
    """The rows of a local file; where none is named, of a data set on the hub.

    A ``.json`` file may hold an object with the rows under ``examples`` (the form of BIG-Bench Hard).

    Raises:
        DataFormatError: the file cannot be read.
        ConfigError: the hub did not give the data set.
    """
    if path is None:
        name = f"hub:{hub_id}{f':{config}' if config else ''}#{split}"
        try:
            return [SuiteRow(where=f"{hub_id}, {split} row {n}", number=n, values=row) for n, row in read_rows(name)]
        except (ConfigError, DataFormatError) as error:
            raise ConfigError(f"{error}; give local files instead (suite.data)") from None
    rows = list(read_rows(path))
    is_json = path.suffix == ".json"
    if is_json and len(rows) == 1 and isinstance(examples := rows[0][1].get("examples"), list):
        rows = list(enumerate(examples, start=1))
    if not all(isinstance(row, dict) for _, row in rows):
        raise DataFormatError(path, None, "expected JSON objects under 'examples'")
    place = f"{path}, row " if is_json else f"{path}:"
    return [SuiteRow(where=f"{place}{number}", number=number, values=row) for number, row in rows]


def data_rows(settings: SuiteSettings, hub_id: str = "", config: str | None = None, split: str = "") -> list[SuiteRow]:
    """Those rows of a suite's data that the settings name; from the hub as `suite_rows`.

    Raises:
        DataFormatError, ConfigError: as `suite_rows`.
    """
    return suite_rows(settings.data, hub_id, config, split)[settings.used_rows]


def check_enough(rows: Sequence[object], needed: int, name: str) -> None:
    if len(rows) < needed:
        raise ConfigError(f"the {name} data has {len(rows)} usable rows; {needed} are asked for")


def drawn_rows(rows: Sequence[SuiteRow], settings: SuiteSettings) -> list[SuiteRow]:
    """``settings.questions`` of the rows, drawn by the seed.

    Raises:
        ConfigError: there are fewer.
    """
    check_enough(rows, settings.questions, settings.name)
    return random.Random(settings.seed).sample(rows, settings.questions)
