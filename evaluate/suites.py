"""The suites: what becomes of the rows of each data set.

GSM8K (arXiv:2110.14168): grade-school maths with worked answers, several examples a prompt, in the form of
arXiv:2210.00720, which arXiv:2310.05736 compresses. BIG-Bench Hard (arXiv:2210.09261): reasoning tasks with three
worked examples each; the chain-of-thought prompts come from the authors' repository (suzgunmirac/BIG-Bench-Hard, folder
cot-prompts), the questions from there too, or from the hub; the tests have no worked answers, so the gold text is the
sentence with which the examples end, "So the answer is ….". ShareGPT: dialogues. Arxiv: scientific articles. NQ: see
`nq`; LongBench, MeetingBank and QMSum: see `long_documents`. Tools and dialogue: generated, see `tool_output` and
`dialogue`. And the user's own prompts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

from terselm.compress.prompt import Prompt
from terselm.data.rows import Json
from terselm.errors import ConfigError, DataFormatError
from terselm.evaluate.answers import answer_right, bbh_right, maths_right
from terselm.evaluate.dialogue import conversations
from terselm.evaluate.items import Item, Suite, full_text
from terselm.evaluate.long_documents import longbench_suite, meetingbank_suite, paragraphs, qmsum_suite
from terselm.evaluate.nq import nq_suite
from terselm.evaluate.settings import SuiteName, SuiteSettings
from terselm.evaluate.suite_rows import SuiteRow, check_enough, data_rows, suite_rows
from terselm.evaluate.tool_output import KINDS, tool_outputs

_GSM8K_ID = "openai/gsm8k"
_GSM8K_INSTRUCTION = "Please reference the following examples to answer the math question,"
_ASK = "Let's think step by step"
_GSM8K_CALCULATOR = re.compile(r"<<.*?>>")
_BBH_ID = "lukaemon/bbh"
_BBH_CANARY = "-----\n"
_TOOLS_INSTRUCTION = "Answer the question with the exact value that the output of the tool shows."
_DIALOGUE_INSTRUCTION = "Answer the question with what was said in the conversation; of what was corrected, the latest."
_SHAREGPT_ID = "anon8231489123/ShareGPT_Vicuna_unfiltered"
_SPEAKERS = {"human": "User", "user": "User", "gpt": "Assistant", "assistant": "Assistant"}
_ARXIV_ID = "liyucheng/arxiv-march-2023"
_PROMPT_KEYS = {"instruction", "demonstrations", "question", "answer"}


def load_suite(settings: SuiteSettings) -> Suite:
    """Read the questions of a suite.

    Raises:
        ConfigError, DataFormatError: the data is missing or of another form.
    """
    readers = {
        SuiteName.GSM8K: _gsm8k,
        SuiteName.BBH: _bbh,
        SuiteName.NQ: nq_suite,
        SuiteName.SHAREGPT: _sharegpt,
        SuiteName.ARXIV: _arxiv,
        SuiteName.TOOLS: _tools,
        SuiteName.DIALOGUE: _dialogue,
        SuiteName.LONGBENCH: longbench_suite,
        SuiteName.MEETINGBANK: meetingbank_suite,
        SuiteName.QMSUM: qmsum_suite,
        SuiteName.PROMPTS: _own_prompts,
    }
    return readers[settings.name](settings)


def rows_of(suite: Suite) -> Iterator[Json]:
    """The items as rows that ``terselm collect --utility`` and ``compress-file`` read.

    An id ends with six digits of a hash of the prompt, so that files of several settings can be put together.
    """
    for item in suite.items:
        prompt = {
            "instruction": item.prompt.instruction,
            "demonstrations": list(item.prompt.demonstrations),
            "question": item.prompt.question,
        }
        digest = blake2b(full_text(item.prompt).encode(), digest_size=3).hexdigest()
        row: Json = {"id": f"{suite.name}-{item.id}-{digest}", **prompt}
        if item.gold.strip():
            row["answer"] = item.gold
        yield row


def _gsm8k(settings: SuiteSettings) -> Suite:
    """Questions of the test rows, shared out among demonstration sets that are drawn from the training rows."""
    test = data_rows(settings, _GSM8K_ID, "main", "test")
    if len(test) < settings.questions:
        raise ConfigError(f"GSM8K has {len(test)} test rows here; {settings.questions} questions are asked for")
    sets = _demonstration_sets(settings)
    items = []
    for number, row in enumerate(random.Random(settings.seed).sample(test, settings.questions)):
        worked, final = _worked_answer(row)
        chosen = number % len(sets)
        prompt = Prompt(instruction=_GSM8K_INSTRUCTION, demonstrations=sets[chosen], question=_maths_question(row))
        items.append(Item(id=f"{number}", prompt=prompt, gold=f"\n{worked}", answers=(final,), group=f"set {chosen}"))
    return Suite(
        name="gsm8k", items=items, right=lambda text, item: maths_right(text, item.answers), stop=("\n\n", "Question:")
    )


def _demonstration_sets(settings: SuiteSettings) -> list[tuple[str, ...]]:
    if settings.prompt is not None:
        return [_demonstrations(settings.prompt)]
    train = suite_rows(settings.train, _GSM8K_ID, "main", "train")
    if len(train) < settings.shots:
        raise ConfigError(f"GSM8K has {len(train)} training rows here; {settings.shots} demonstrations are asked for")
    draws = (random.Random(f"{settings.seed}/{number}") for number in range(settings.sets))
    return [
        tuple(f"{_maths_question(row)}\n{_worked_answer(row)[0]}" for row in draw.sample(train, settings.shots))
        for draw in draws
    ]


def _maths_question(row: SuiteRow) -> str:
    return f"Question: {row.text('question').strip()}\n{_ASK}"


def _worked_answer(row: SuiteRow) -> tuple[str, str]:
    """The steps with "The answer is …" as their end, and the final number."""
    steps, mark, final = row.text("answer").partition("\n####")
    if not mark or not final.strip():
        raise ConfigError(f"{row.where}: expected an answer that ends with '#### NUMBER'")
    return f"{_GSM8K_CALCULATOR.sub('', steps).strip()}\nThe answer is {final.strip()}", final.strip()


def _demonstrations(path: Path) -> tuple[str, ...]:
    """Demonstrations that stand in a text file with blank lines between them.

    Raises:
        DataFormatError: the file cannot be read, or is blank.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataFormatError(path, None, f"cannot be read: {error}") from None
    demonstrations = tuple(part.strip() for part in re.split(r"\n\s*\n", text) if part.strip())
    if not demonstrations:
        raise DataFormatError(path, None, "holds no demonstrations; separate them by blank lines")
    return demonstrations


def _bbh(settings: SuiteSettings) -> Suite:
    """``settings.questions`` questions of every task."""
    if settings.prompt is None or not settings.prompt.is_dir():
        raise ConfigError(
            f"suite.prompt is {settings.prompt}; expected the folder with BBH's chain-of-thought prompts "
            "(cot-prompts of github.com/suzgunmirac/BIG-Bench-Hard), one TASK.txt each"
        )
    there = sorted(path.stem for path in settings.prompt.glob("*.txt"))
    if missing := sorted(set(settings.tasks) - set(there)):
        raise ConfigError(f"{settings.prompt} holds no prompt for {', '.join(missing)}; there are {', '.join(there)}")
    items = [item for task in settings.tasks or there for item in _bbh_task(task, settings, settings.prompt)]
    if not items:
        raise ConfigError(f"{settings.prompt} holds no prompts; expected one TASK.txt a task")
    return Suite(
        name="bbh",
        items=items,
        right=lambda text, item: bbh_right(text, item.answers, item.prompt.question),
        stop=("\n\nQ:",),
    )


def _bbh_task(task: str, settings: SuiteSettings, prompts: Path) -> list[Item]:
    instruction, demonstrations = _bbh_prompt(prompts / f"{task}.txt")
    rows = suite_rows(settings.data / f"{task}.json" if settings.data is not None else None, _BBH_ID, task, "test")
    rows = rows[settings.used_rows]
    chosen = random.Random(f"{settings.seed}/{task}").sample(rows, min(settings.questions, len(rows)))
    items = []
    for number, row in enumerate(chosen):
        question, answer = f"Q: {row.text('input').strip()}\nA: {_ASK}.", row.text("target").strip()
        prompt = Prompt(instruction=instruction, demonstrations=demonstrations, question=question)
        gold = f"\nSo the answer is {answer}."
        items.append(Item(id=f"{task}/{number}", prompt=prompt, gold=gold, answers=(answer,), group=task))
    return items


def _bbh_prompt(path: Path) -> tuple[str, tuple[str, ...]]:
    """The instruction and the worked examples of a chain-of-thought prompt."""
    parts = [
        part.split(_BBH_CANARY, 1)[-1]
        for part in _demonstrations(path)
        if "canary" not in part.lower() or _BBH_CANARY in part
    ]
    first = next((i for i, part in enumerate(parts) if part.startswith("Q:")), len(parts))
    examples: list[str] = []
    for part in parts[first:]:
        if part.startswith("Q:"):
            examples.append(part)
        else:
            examples[-1] += f"\n\n{part}"
    return "\n\n".join(parts[:first]), tuple(examples)


def _sharegpt(settings: SuiteSettings) -> Suite:
    """Dialogues: all turns but the last two are to be compressed, the last question asked, the last answer compared.

    Rows have ``conversations``: a list of ``from`` (``human`` or ``gpt``) and ``value``.
    """
    rows = data_rows(settings, _SHAREGPT_ID, None, "train")
    dialogues = [(row, turns) for row in rows if (turns := _turns(row)) is not None]
    check_enough(dialogues, settings.questions, "sharegpt")
    items = []
    for row, turns in random.Random(settings.seed).sample(dialogues, settings.questions):
        question, reference = turns[-2][1], turns[-1][1]
        demonstrations = [f"{speaker}: {text}" for speaker, text in turns[:-2]]
        prompt = Prompt(demonstrations=demonstrations, question=f"User: {question}\nAssistant:")
        gold = f" {reference}"
        items.append(Item(id=f"{row.number}", prompt=prompt, gold=gold, answers=(reference,), group=row.where))
    return Suite(name="sharegpt", items=items, right=None, stop=("\nUser:",))


def _turns(row: SuiteRow) -> list[tuple[str, str]] | None:
    """Speaker and text of each turn up to the last answer; None for a dialogue that is too short."""
    values = row.values.get("conversations")
    if not isinstance(values, list):
        return None
    turns = [
        (_SPEAKERS[turn["from"]], turn["value"].strip())
        for turn in values
        if isinstance(turn, dict) and turn.get("from") in _SPEAKERS and str(turn.get("value", "")).strip()
    ]
    while turns and turns[-1][0] != "Assistant":
        turns.pop()
    return turns if len(turns) >= 4 and turns[-2][0] == "User" else None


def _arxiv(settings: SuiteSettings) -> Suite:
    """Articles to summarise. There is no gold summary: answers are compared with that to the uncompressed article.

    Rows have ``text``. Paragraphs are the demonstrations.
    """
    rows = data_rows(settings, _ARXIV_ID, None, "train")
    check_enough(rows, settings.questions, "arxiv")
    question = "Summarize the article above in a few sentences.\nSummary:"
    items = []
    for row in random.Random(settings.seed).sample(rows, settings.questions):
        prompt = Prompt(demonstrations=paragraphs(row.text("text")), question=question)
        items.append(Item(id=f"{row.number}", prompt=prompt, gold="", answers=(), group=row.where))
    return Suite(name="arxiv", items=items, right=None, stop=("\n\n",))


def _tools(settings: SuiteSettings) -> Suite:
    """``settings.questions`` outputs of every kind, each with its question."""
    if strangers := sorted(set(settings.tasks) - KINDS.keys()):
        raise ConfigError(f"unknown kinds of tool output: {', '.join(strangers)}; there are {', '.join(KINDS)}")
    lookups = tool_outputs(settings.questions, settings.seed, settings.tasks)
    by_id = {f"{lookup.kind}/{number % settings.questions}": lookup for number, lookup in enumerate(lookups)}
    items = [
        Item(
            id=name,
            prompt=Prompt(
                instruction=_TOOLS_INSTRUCTION, demonstrations=[lookup.text], question=_asked(lookup.question)
            ),
            gold=f" {lookup.answer}",
            answers=(lookup.answer,),
            group=name,
        )
        for name, lookup in by_id.items()
    ]
    return _lookup_suite("tools", items, lambda text, item: by_id[item.id].kept(text))


def _dialogue(settings: SuiteSettings) -> Suite:
    """``settings.questions`` conversations; every turn is a demonstration."""
    by_id = {f"{number}": talk for number, talk in enumerate(conversations(settings.questions, settings.seed))}
    items = [
        Item(
            id=name,
            prompt=Prompt(
                instruction=_DIALOGUE_INSTRUCTION,
                demonstrations=[f"{_SPEAKERS[role]}: {text}" for role, text in talk.turns],
                question=_asked(talk.question),
            ),
            gold=f" {talk.answer}",
            answers=(talk.answer,),
            group=name,
        )
        for name, talk in by_id.items()
    ]
    return _lookup_suite("dialogue", items, lambda text, item: by_id[item.id].kept(text))


def _asked(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _lookup_suite(name: str, items: Sequence[Item], kept: Callable[[str, Item], bool]) -> Suite:
    """A suite whose answers are strings of the prompt, which an answer has to hold as they stand there."""
    return Suite(
        name=name,
        items=items,
        right=lambda text, item: any(_detail(answer) in text for answer in item.answers),
        kept=kept,
        max_new_tokens=60,
        stop=("\n\n",),
    )


def _detail(answer: str) -> str:
    """What a target is asked for: of ``"port": 8080`` or ``+  LIMIT = 7`` the value."""
    return re.split(r"[:=] ", answer)[-1]


def _own_prompts(settings: SuiteSettings) -> Suite:
    """At most ``settings.questions`` prompts of the user's file, in its order."""
    if settings.data is None:
        raise ConfigError("give a file of prompts (JSON Lines: instruction, demonstrations, question, answer)")
    rows = data_rows(settings)[: settings.questions]
    if not rows:
        raise ConfigError(f"{settings.data} holds no prompts")
    items = []
    for number, row in enumerate(rows):
        if unknown := sorted(row.values.keys() - _PROMPT_KEYS):
            keys = ", ".join(sorted(_PROMPT_KEYS))
            raise ConfigError(f"{row.where}: unknown key {unknown[0]!r}; expected some of {keys}")
        answer = row.values.get("answer") or ""
        if not isinstance(answer, str):
            raise ConfigError(f"{row.where}: the answer is a {type(answer).__name__}; expected a text")
        prompt = Prompt(**{key: row.values[key] for key in _PROMPT_KEYS - {"answer"} if row.values.get(key)})
        gold = answer if not answer or answer[0].isspace() else f"\n{answer}"
        answers = (answer,) if answer else ()
        items.append(Item(id=f"{number}", prompt=prompt, gold=gold, answers=answers, group=f"{number}"))
    return Suite(
        name="prompts",
        items=items,
        right=lambda text, item: answer_right(text, item.answers),
    )
