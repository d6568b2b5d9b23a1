"""The compact file of log-probabilities that lies beside the records: a target's opinion on every token of a text.

It is what surprisal matching and distillation read. One row is one text; the columns are those of `ScoredText`, and
docs/data.md lists them. To use it, join by id and align by characters, since the tokenizer is the target's::

    scored = {text.id: text for text in LogProbFile("records.logprobs.parquet")}
    text = scored[record.id]
    text.text[text.starts[0] : text.ends[0]]  # the characters of its first token
    -text.logprobs                            # surprisals, nats; NaN where the target gives none

A token's span covers every character that it holds a part of: spans go upwards and may overlap, where byte-level pieces
share a character. So give each token to the word in which its span starts. pyarrow is imported on first use.

`score_texts` reads such opinions off a model in this process.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from terselm.data.rows import open_parquet
from terselm.errors import DataFormatError
from terselm.extras import need
from terselm.files import atomic_file

if TYPE_CHECKING:
    import pyarrow

    from terselm.data.schema import PlainText
    from terselm.models import CausalLM
    from terselm.models.scoring import RowScores

_VERSION = "1"
_ROWS_AT_ONCE = 256


class Given(StrEnum):
    """What a token's probability is conditioned on.

    Attributes:
        TEXT: the tokens of ``text`` before it, after the start token and nothing else.
        PROMPT: the prompt as the target was asked, then the tokens of ``text`` before it; ``text`` is the response
            alone.
    """

    TEXT = "text"
    PROMPT = "prompt"


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredText:
    """One text and what the target thinks of it; ``T`` tokens, the ``K`` likeliest at each position.

    Attributes:
        id: the record's.
        response_start: character at which the response begins; None for a text that is not prompt and response.
        starts: ``(T,)`` first character of each token.
        ends: ``(T,)`` the character after its last.
        logprobs: ``(T,)`` nats; NaN where the target gives none, such as at the first token of some endpoints.
        token_ids: ``(T,)`` in the target's vocabulary; None where the endpoint does not tell.
        tokens: ``T`` pieces in UTF-8, a part of a character each at worst; None where the ids say it all.
        top_logprobs: ``(T, K)`` nats, descending; -inf where the target gave fewer.
        top_ids: ``(T, K)``; -1 where the target gave fewer.
        top_tokens: ``T`` times at most ``K`` pieces in UTF-8.

    Raises:
        ValueError: the lengths differ, a span is not in the text, or a log-probability is positive.
    """

    id: str
    text: str
    given: Given = Given.TEXT
    response_start: int | None = None
    starts: NDArray[np.int32]
    ends: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    token_ids: NDArray[np.int32] | None = None
    tokens: tuple[bytes, ...] | None = None
    top_logprobs: NDArray[np.float32] | None = None
    top_ids: NDArray[np.int32] | None = None
    top_tokens: tuple[tuple[bytes, ...], ...] | None = None

    def __post_init__(self) -> None:
        count = len(self.logprobs)
        for name in ("starts", "ends", "token_ids", "tokens", "top_logprobs", "top_ids", "top_tokens"):
            value = getattr(self, name)
            if value is not None and len(value) != count:
                raise ValueError(f"{name} has {len(value)} entries for {count} log-probabilities")
        if count and not (
            self.starts.min() >= 0 and self.ends.max() <= len(self.text) and (self.starts <= self.ends).all()
        ):
            raise ValueError(f"a token's span is not within the text of {len(self.text)} characters")
        if (self.logprobs > 0).any():
            raise ValueError(f"a log-probability is {self.logprobs.max()}; expected at most 0")


@dataclass(frozen=True, kw_only=True)
class About:
    """Of a whole file: who scored, in which tokenizer, by what way.

    Attributes:
        tokenizer: a name that `load_tokenizer` takes where the target is local, else the model's name.
        source: the endpoint, or ``local``.
    """

    model: str
    tokenizer: str
    source: str


class LogProbFile:
    """Reads a file of log-probabilities, row by row, in the order of the records.

    Args:
        path: a Parquet file that `write_logprobs` wrote.

    Raises:
        ConfigError: pyarrow is missing.
        DataFormatError: no such file, or it is not one of log-probabilities.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise DataFormatError(self.path, None, "no such file")
        with open_parquet(self.path) as file:
            self._count: int = file.metadata.num_rows
            about = {key.decode(): value.decode() for key, value in (file.schema_arrow.metadata or {}).items()}
        if about.get("terselm.logprobs") != _VERSION:
            raise DataFormatError(self.path, None, "is Parquet, but not a file of log-probabilities of this version")
        self.about = About(**{name: about[f"terselm.{name}"] for name in ("model", "tokenizer", "source")})

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[ScoredText]:
        number = 0
        with open_parquet(self.path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                for index in range(batch.num_rows):
                    number += 1
                    try:
                        yield _from_row({name: batch.column(name)[index] for name in batch.schema.names})
                    except (ValueError, TypeError, KeyError) as error:
                        raise DataFormatError(self.path, number, str(error)) from None


def write_logprobs(path: Path | str, texts: Iterable[ScoredText], about: About) -> int:
    """Write a file of log-probabilities, which appears complete or not at all; return the number of texts.

    Raises:
        ConfigError: pyarrow is missing.
        OSError: the disk is full or the folder is not writable; the file is then as it was.
    """
    parquet = need("pyarrow.parquet", "collect")
    schema = _schema(about)
    count = 0
    with (
        atomic_file(Path(path), binary=True) as file,
        parquet.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        rows: list[dict[str, Any]] = []
        for text in texts:
            rows.append(_to_row(text))
            count += 1
            if len(rows) == _ROWS_AT_ONCE:
                _flush(writer, rows, schema)
        _flush(writer, rows, schema)
    return count


def _schema(about: About) -> pyarrow.Schema:
    import pyarrow as pa

    ints, floats, pieces = pa.list_(pa.int32()), pa.list_(pa.float32()), pa.list_(pa.binary())
    fields = {
        "id": pa.string(),
        "text": pa.string(),
        "given": pa.string(),
        "response_start": pa.int32(),
        "starts": ints,
        "ends": ints,
        "logprobs": floats,
        "token_ids": ints,
        "tokens": pieces,
        "top_logprobs": pa.list_(floats),
        "top_ids": pa.list_(ints),
        "top_tokens": pa.list_(pieces),
    }
    metadata = {f"terselm.{name}": value for name, value in vars(about).items()} | {"terselm.logprobs": _VERSION}
    return pa.schema(list(fields.items()), metadata=metadata)


def _flush(writer: Any, rows: list[dict[str, Any]], schema: pyarrow.Schema) -> None:
    import pyarrow as pa

    if rows:
        writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        rows.clear()


def _to_row(text: ScoredText) -> dict[str, Any]:
    row = dict(vars(text))
    for name in ("top_logprobs", "top_ids"):
        if row[name] is not None:
            row[name] = list(row[name])
    return row


def _from_row(row: dict[str, Any]) -> ScoredText:
    def array(name: str, dtype: type) -> Any:
        return row[name].values.to_numpy(zero_copy_only=False).astype(dtype) if row[name].is_valid else None

    def table(name: str, dtype: type) -> Any:
        if not row[name].is_valid:
            return None
        return np.array(row[name].as_py(), dtype=dtype).reshape(len(row[name]), -1)

    tokens, top_tokens = row["tokens"].as_py(), row["top_tokens"].as_py()
    return ScoredText(
        id=row["id"].as_py(),
        text=row["text"].as_py(),
        given=Given(row["given"].as_py()),
        response_start=row["response_start"].as_py(),
        starts=array("starts", np.int32),
        ends=array("ends", np.int32),
        logprobs=array("logprobs", np.float32),
        token_ids=array("token_ids", np.int32),
        tokens=None if tokens is None else tuple(tokens),
        top_logprobs=table("top_logprobs", np.float32),
        top_ids=table("top_ids", np.int32),
        top_tokens=None if top_tokens is None else tuple(map(tuple, top_tokens)),
    )


def score_texts(
    lm: CausalLM, texts: Sequence[PlainText], top_k: int = 0, prompts: Sequence[Sequence[int]] | None = None
) -> Iterator[list[ScoredText]]:
    """Score texts, the longest first; yield those that each pass has completed.

    Args:
        top_k: how many of the likeliest tokens to give at each position, with their log-probabilities.
        prompts: token ids that are read before each text, exactly as they are, and not scored; by default, the start
            token.

    Raises:
        ModelError: the memory is too small for one text, or the model's logits are not made as usual; see `OutputHead`.
    """
    from terselm.models.scoring import RowScorer

    encoded = [
        lm.tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False) for text in texts
    ]
    given = Given.TEXT if prompts is None else Given.PROMPT
    befores = [[lm.start_id]] * len(texts) if prompts is None else [list(prompt) for prompt in prompts]
    for first in sorted({before[0] for before in befores}):
        numbers = [number for number, before in enumerate(befores) if before[0] == first]
        rows = [[*befores[number][1:], *encoded[number].input_ids] for number in numbers]
        skips = [len(befores[number]) - 1 for number in numbers]
        for done in RowScorer(replace(lm, first_id=first)).passes(rows, skips=skips, top_k=top_k):
            yield [_scored_text(texts[numbers[row]], encoded[numbers[row]], scores, given) for row, scores in done]


def _scored_text(text: PlainText, encoding: Any, scores: RowScores, given: Given) -> ScoredText:
    offsets = np.array(encoding.offset_mapping, np.int32).reshape(-1, 2)
    return ScoredText(
        id=text.id,
        text=text.text,
        given=given,
        response_start=text.response_start,
        starts=offsets[:, 0],
        ends=offsets[:, 1],
        token_ids=np.array(encoding.input_ids, np.int32),
        # rounding can take a token a hair above certainty
        logprobs=-scores.nats.clip(min=0),
        top_logprobs=None if scores.top_nats is None else -scores.top_nats.clip(min=0),
        top_ids=None if scores.top_ids is None else scores.top_ids.astype(np.int32),
    )
