"""How right an answer is: its final number, option or words against the right ones, or its likeness to a reference.

Answers are read as plain text goes on and as chat models write: ``\\boxed{14}``, ``**14**``, "**Answer:** (B)".

Likeness is measured by the libraries that everybody uses. BLEU: sacrebleu; ROUGE-1/2/L: rouge-score, with stemming;
BERTScore: torchmetrics.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from decimal import Decimal, InvalidOperation

from terselm.errors import ConfigError
from terselm.extras import first_line, need

_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)")
_CLAIM = re.compile(r"(?:answer(?: to [^.:\n]{1,60}?)?|correct (?:option|choice)) is\b:?", re.IGNORECASE)
_HEADING = re.compile(
    r"^\W*(?:the |my )?(?:final |correct )?answer\b(?:\W{0,3}[:=]|\W*$)", re.IGNORECASE | re.MULTILINE
)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_BOLD = re.compile(r"\*\*(.+?)\*\*")
_BOLD_STEP = re.compile(r"\s*(?:step|part|case)\b|\s*\d+[.):]\s*", re.IGNORECASE)  # a heading, not an answer
_LATEX = [(re.compile(pattern), text) for pattern, text in (
    (r"\{,\}", ","),
    (r"\\[,;!]|\\(?=[$%])", ""),
    (r"\\(?:text|mathrm|mathbf|textbf)\s*\{([^{}]*)\}", r" \1 "),
    (r"\^\s*(?:\{[^{}]*\}|\w+)", ""),  # the square of a unit
)]  # fmt: skip
_CHOICE = re.compile(r"^\s*\(([A-Z])\)\s*(\S.*)$", re.MULTILINE)
_PAIRS = ({"yes", "no"}, {"true", "false"}, {"valid", "invalid"})
_MARK = re.compile(r"^\s*####\s*(.+)$", re.MULTILINE)
_OPTION = re.compile(r"\(([A-Z])\)")
_BARE_OPTION = re.compile(r"(?<![A-Za-z])([A-Z])(?![A-Za-z])")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PUBLISHED_LAYER = {"roberta-large": 17, "bert-base-uncased": 9, "distilroberta-base": 5}  # that agree best with people
_BERT_WINDOW = 512  # tokens; what is beyond is not read


def maths_answer(text: str) -> str | None:
    """The final number: that after ``####``; in the last ``\\boxed{}``; what is claimed; else the last.

    A claim is the first line that says "answer is", else the last that begins with "Answer:"; what is bold in it comes
    first. Without numbers there, the last number up to the end of that line counts.

    Source: the evaluation of LLMLingua's GSM8K example; boxes and bold type are how chat models write.
    """
    if mark := _MARK.search(text):
        return _last_number(mark[1])
    if (boxes := _BOXED.findall(text)) and (number := _last_number(boxes[-1])):
        return number
    claim = _claim(text)
    if claim is None:
        lines = [line for line in text.split("\n") if line.strip()]
        bold = [] if not lines else [some for some in _BOLD.findall(lines[-1]) if not _BOLD_STEP.match(some)]
        return next(filter(None, map(_last_number, reversed(bold))), None) or _last_number(text)
    line, end = claim
    return next(filter(None, map(_last_number, [*_BOLD.findall(line), line])), None) or _last_number(text[:end])


def _claim(text: str) -> tuple[str, int] | None:
    """What an answer claims to be the answer, to the end of its line, and where that ends; None without a claim.

    Where nothing follows in the line of the claim, the next line that says something is the answer.
    """
    match = _CLAIM.search(text) or next(iter([*_HEADING.finditer(text)][-1:]), None)
    if match is None:
        return None
    begin = match.end()
    for line in text[begin:].split("\n"):
        end = begin + len(line)
        if line.strip(" *:$_#") not in ("", "\\[", "\\("):
            return line, end
        begin = end + 1
    return "", len(text)


def _last_number(text: str) -> str | None:
    for pattern, instead in _LATEX:
        text = pattern.sub(instead, text)
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def same_number(a: str, b: str) -> bool:
    """``1,080.00`` and ``1080`` are the same."""
    try:
        return Decimal(a.replace(",", "")) == Decimal(b.replace(",", ""))
    except InvalidOperation:
        return False


def maths_right(text: str, answers: Sequence[str]) -> bool:
    """Whether the final number is that of an accepted answer."""
    number = maths_answer(text)
    return number is not None and any(same_number(number, answer) for answer in answers)


def claimed(text: str) -> str:
    """What is boxed, or claimed (see `maths_answer`), without the full stop; else the last line.

    Source: the prompts of arXiv:2210.09261, whose worked answers end with "So the answer is …."
    """
    return _tidy(_claimed_line(text))


def bbh_right(text: str, answers: Sequence[str], question: str = "") -> bool:
    """Whether an answer to a BIG-Bench Hard question is right: an option's letter, a word, a number or a list.

    Args:
        question: its options are known by their texts, too: "(A) 2pm to 6pm" in a line.
    """
    line = _claimed_line(text)
    options = {normalised(option): letter for letter, option in _CHOICE.findall(question)}
    return any(_bbh_same(line, answer, options) for answer in answers)


def _claimed_line(text: str) -> str:
    if boxes := _BOXED.findall(text):
        return re.sub(r"\\[a-z]+\s*\{([^{}]*)\}", r"\1", boxes[-1])
    if (claim := _claim(text)) is not None:
        return claim[0]
    lines = [line for line in text.split("\n") if line.strip()]
    return lines[-1] if lines else ""


def _tidy(line: str) -> str:
    return line.strip().strip("*").strip().removesuffix(".").strip("\"'`* ")


def _bbh_same(line: str, answer: str, options: Mapping[str, str]) -> bool:
    """Whether a claim is the answer; where it is not an option, what alone is bold in the line is the claim."""
    if option := re.fullmatch(r"\(([A-Z])\)", answer):
        return _option(_tidy(line), options) == option[1]
    bold = _BOLD.findall(line)
    claim = _tidy(bold[0] if len(bold) == 1 else line)
    if re.fullmatch(r"-?\d+", answer):
        number = _last_number(claim)
        return number is not None and same_number(number, answer)
    for pair in _PAIRS:
        if answer.lower() in pair:
            return _one_of(claim.lower(), pair) == answer.lower()
    return _words(claim) == _words(answer)


def _option(claim: str, options: Mapping[str, str]) -> str | None:
    """The letter in brackets; the option that reads so; or a letter by itself."""
    if letters := _OPTION.findall(claim):
        return str(letters[0])
    if letter := options.get(normalised(claim)):
        return letter
    letters = _BARE_OPTION.findall(claim)
    return str(letters[0]) if letters else None


def _one_of(claim: str, pair: Set[str]) -> str | None:
    """Which of two words: the first word of the claim, or the only one of them in it, unless "not" is there, too."""
    words = re.findall(r"[a-z]+", claim)
    if words and words[0] in pair:
        return str(words[0])
    there = pair & set(words)
    return min(there) if len(there) == 1 and "not" not in words else None


def _words(text: str) -> list[str]:
    """The members of a list, whatever stands between them: spaces, commas, or nothing between brackets."""
    if not re.search(r"\w", text):
        return [character for character in text if not character.isspace() and character != ","]
    return re.sub(r"[,;\"'`]", " ", text.lower()).split()


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces.

    Source: the evaluation script of SQuAD 1.1, which open-domain question answering uses.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def short_answer_right(text: str, answers: Sequence[str]) -> bool:
    """Whether an accepted answer stands in the answer's first line, both normalised.

    Source: the accuracy of arXiv:2307.03172 (Lost in the Middle), by whole words.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    return bool(lines) and holds_answer(lines[0], answers)


def holds_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether an accepted answer stands in a text as whole words, both normalised."""
    padded = f" {normalised(text)} "
    return any(f" {normalised(answer)} " in padded for answer in answers if normalised(answer))


def short_answer(text: str) -> str:
    """What is claimed to be the answer, to the end of its line; else the first line that says something."""
    claim = _claim(text)
    line = claim[0] if claim is not None else next((line for line in text.split("\n") if line.strip()), "")
    return line.strip()


def answer_right(text: str, answers: Sequence[str]) -> bool:
    """Whether a text, or what it boxes or claims to be the answer, is an accepted answer, both normalised."""
    said = {normalised(text)}
    if _BOXED.search(text) or _claim(text) is not None:
        said.add(normalised(claimed(text)))
    return any(normalised(answer) in said for answer in answers)


def squad_exact(text: str, answers: Sequence[str]) -> bool:
    """Whether the short answer is an accepted one and nothing else, both normalised.

    Source: the evaluation script of SQuAD 1.1.
    """
    said = normalised(short_answer(text))
    return any(said == normalised(answer) for answer in answers)


def squad_f1(text: str, answers: Sequence[str]) -> float:
    """F1 of the words of the short answer and of an accepted one, normalised: of that which is most like it.

    Source: the evaluation script of SQuAD 1.1.
    """
    said = normalised(short_answer(text)).split()
    return max((_f1(said, normalised(answer).split()) for answer in answers), default=0.0)


def _f1(said: Sequence[str], accepted: Sequence[str]) -> float:
    common = sum((Counter(said) & Counter(accepted)).values())
    return 2 * common / (len(said) + len(accepted)) if common else 0.0


def likeness(answers: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """Sentence BLEU and the F-measures of ROUGE-1, 2 and L of each answer, in percent.

    Raises:
        ConfigError: the libraries are not installed.
    """
    sacrebleu = need("sacrebleu", "evaluate")
    scorer = need("rouge_score.rouge_scorer", "evaluate").RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    pairs = list(zip(answers, references, strict=True))
    rouge = [scorer.score(reference, answer) for answer, reference in pairs]
    return {
        "bleu": [sacrebleu.sentence_bleu(answer, [reference]).score for answer, reference in pairs],
        **{name: [100 * score[name].fmeasure for score in rouge] for name in ("rouge1", "rouge2", "rougeL")},
    }


def bert_score(answers: Sequence[str], references: Sequence[str], model: str) -> list[float]:
    """The F1 of BERTScore of each answer, in percent, not rescaled; special tokens do not count.

    Args:
        model: encoder on the hub or in a folder, whose last layer is used; of ``roberta-large`` and others that the
            BERTScore paper (arXiv:1904.09675) examined, the layer that it names.

    Raises:
        ConfigError: torchmetrics is not installed, or there is no such model.
    """
    scores = need("torchmetrics.functional.text.bert", "evaluate").bert_score
    try:
        computed = scores(
            list(answers),
            list(references),
            model_name_or_path=model,
            num_layers=_PUBLISHED_LAYER.get(model),
            max_length=_BERT_WINDOW,
            truncation=True,
        )
    except OSError as error:
        raise ConfigError(
            f"BERTScore could not get its model {model!r}: {first_line(error)}; name another in bert_score"
        ) from None
    likenesses = computed["f1"].reshape(-1).tolist()  # of one text, it is a number
    # Nothing is like an empty answer.
    return [100 * value if answer.strip() else 0.0 for answer, value in zip(answers, likenesses, strict=True)]
