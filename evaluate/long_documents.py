"""Suites of long documents, from the hub: LongBench, MeetingBank and QMSum.

LongBench (arXiv:2308.14508): 21 tasks, each with a context, mostly with a question. MeetingBank (arXiv:2305.17529):
transcripts to summarise. QMSum (arXiv:2104.05938): transcripts with a question about them, in a cleaned copy whose
inputs begin with the question. A local file of the same columns does as well. A text is cut into paragraphs of a few
hundred words, which are the demonstrations.
"""

from __future__ import annotations

from collections.abc import Callable

from terselm.compress.prompt import Prompt
from terselm.errors import ConfigError
from terselm.evaluate.answers import holds_answer
from terselm.evaluate.items import Item, Suite
from terselm.evaluate.settings import SuiteSettings
from terselm.evaluate.suite_rows import SuiteRow, data_rows, drawn_rows

_LONGBENCH_ID = "THUDM/LongBench"
_MEETINGBANK_ID = "huuuyeah/meetingbank"
_QMSUM_ID = "pszemraj/qmsum-cleaned"
_SHORT_ANSWERS = {
    *("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa", "trec"),
    *("passage_count", "passage_retrieval_en"),
}
"""Tasks of LongBench whose answers are a few words; in the others texts are compared."""
_MOST_NEW_TOKENS = {True: 64, False: 512}  # of short answers, and of texts
_PASSAGE_WORDS = 300
_WHOLE_MEETING = "Summarize the meeting above in a few sentences."


def longbench_suite(settings: SuiteSettings) -> Suite:
    """Questions over one long context; of every task in ``settings.tasks``.

    Rows have ``context``, ``input`` (the question; it may be empty) and ``answers``.

    Raises:
        ConfigError: no task, unless there is a local file; too few rows, or rows of another form.
    """
    if settings.data is None and not settings.tasks:
        raise ConfigError("suite.tasks is empty; name tasks of LongBench, such as suite.tasks=[hotpotqa]")
    items = []
    for task in settings.tasks or [""]:
        rows = data_rows(settings, _LONGBENCH_ID, task, "test")
        if settings.data is not None and task:
            rows = [row for row in rows if row.values.get("dataset", task) == task]
        for row in drawn_rows(rows, settings):
            asked = str(row.values.get("input") or "").strip()
            if not asked:
                asked = "Summarize the text above.\nSummary:"
            question = asked if asked.endswith(":") else f"Question: {asked}\nAnswer:"
            name = str(row.values.get("dataset") or task)
            items.append(_item(row, paragraphs(row.text("context")), question, row.texts("answers"), name))
    short = all(item.group in _SHORT_ANSWERS for item in items)
    return _suite("longbench", items, short=short)


def meetingbank_suite(settings: SuiteSettings) -> Suite:
    """Meetings to summarise. Rows have ``transcript`` and ``summary``."""
    rows = drawn_rows(data_rows(settings, _MEETINGBANK_ID, None, "test"), settings)
    question = f"{_WHOLE_MEETING}\nSummary:"
    items = [_item(row, paragraphs(row.text("transcript"), "\n"), question, [row.text("summary")]) for row in rows]
    return _suite("meetingbank", items, short=False)


def qmsum_suite(settings: SuiteSettings) -> Suite:
    """Questions about meetings. Rows have ``input``, the question and the transcript after a line end, and ``output``.

    Rows of LongBench's form do as well: ``input`` is then the question alone, beside ``context`` and ``answers``.
    """
    items = []
    for row in drawn_rows(data_rows(settings, _QMSUM_ID, None, "test"), settings):
        if "context" in row.values:
            asked, transcript, answers = row.text("input"), row.text("context"), row.texts("answers")
        else:
            asked, _, transcript = row.text("input").strip().partition("\n")
            answers = [row.text("output")]
        if not transcript.strip():
            raise ConfigError(f"{row.where}: expected a question, a line end and a transcript under 'input'")
        items.append(_item(row, paragraphs(transcript, "\n"), f"Question: {asked.strip()}\nAnswer:", answers))
    return _suite("qmsum", items, short=False)


def paragraphs(text: str, between: str = "\n\n") -> list[str]:
    """Paragraphs, the small ones joined up to a few hundred words; ``between`` stands between two of them."""
    joined: list[str] = []
    for paragraph in filter(None, (part.strip() for part in text.split(between))):
        if joined and len(joined[-1].split()) + len(paragraph.split()) <= _PASSAGE_WORDS:
            joined[-1] += f"\n{paragraph}"
        else:
            joined.append(paragraph)
    return joined


def _item(row: SuiteRow, documents: list[str], question: str, answers: list[str], group: str = "") -> Item:
    name = f"{group}/{row.number}" if group else f"{row.number}"
    prompt = Prompt(demonstrations=documents, question=question)
    return Item(id=name, prompt=prompt, gold=f" {answers[0]}", answers=answers, group=group or name)


def _suite(name: str, items: list[Item], *, short: bool) -> Suite:
    """Of short answers, whether they are right and kept; of others, how like the references they are."""
    holds: Callable[[str, Item], bool] | None = (lambda text, item: holds_answer(text, item.answers)) if short else None
    stop = ("\n",) if short else ("\n\n",)
    new_tokens = _MOST_NEW_TOKENS[short]
    return Suite(name=name, items=items, right=holds, kept=holds, short=short, max_new_tokens=new_tokens, stop=stop)
