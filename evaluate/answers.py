"""How right an answer is: its final number, option or words against the right ones, or its likeness to a reference.

Likeness is measured by the libraries that everybody uses. BLEU: sacrebleu; ROUGE-1/2/L: rouge-score, with stemming;
BERTScore: torchmetrics.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

from terselm.errors import ConfigError
from terselm.extras import first_line, need

_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)")
_CLAIM = re.compile(r"answer is:?", re.IGNORECASE)
_MARK = re.compile(r"^\s*####\s*(.+)$", re.MULTILINE)
_OPTION = re.compile(r"\(([A-Z])\)")
_BARE_OPTION = re.compile(r"(?<![A-Za-z])([A-Z])(?![A-Za-z])")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
_PUBLISHED_LAYER = {"roberta-large": 17, "bert-base-uncased": 9, "distilroberta-base": 5}  # that agree best with people
_BERT_WINDOW = 512  # tokens; what is beyond is not read


def maths_answer(text: str) -> str | None:
    """The final number: that after ``####``, else the last up to the end of the first line that says "answer is".

    Source: the evaluation of LLMLingua's GSM8K example.
    """
    if mark := _MARK.search(text):
        numbers = _NUMBER.findall(mark[1])
    else:
        lines = text.split("\n")
        last = next((i for i, line in enumerate(lines) if _CLAIM.search(line)), len(lines))
        numbers = _NUMBER.findall("\n".join(lines[: last + 1]))
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
    """What stands after the first "answer is", to the end of its line and without the full stop; else the last line.

    Source: the prompts of arXiv:2210.09261, whose worked answers end with "So the answer is …."
    """
    if claim := _CLAIM.search(text):
        line = text[claim.end() :].split("\n")[0]
    else:
        lines = [line for line in text.split("\n") if line.strip()]
        line = lines[-1] if lines else ""
    return line.strip().strip("*").strip().removesuffix(".").strip("\"'`* ")


def bbh_right(text: str, answers: Sequence[str]) -> bool:
    """Whether an answer to a BIG-Bench Hard question is right: an option's letter, a word, a number or a list."""
    claim = claimed(text)
    return any(_bbh_same(claim, answer) for answer in answers)


def _bbh_same(claim: str, answer: str) -> bool:
    if option := re.fullmatch(r"\(([A-Z])\)", answer):
        letters = _OPTION.findall(claim) or _BARE_OPTION.findall(claim)
        return bool(letters) and letters[0] == option[1]
    if re.fullmatch(r"-?\d+", answer):
        numbers = _NUMBER.findall(claim)
        return bool(numbers) and same_number(numbers[-1], answer)
    if answer.lower() in ("yes", "no", "true", "false", "valid", "invalid"):
        first = re.search(r"[a-z]+", claim.lower())
        return first is not None and first[0] == answer.lower()
    return _words(claim) == _words(answer)


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


def likeness(answers: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """Sentence BLEU and the F-measures of ROUGE-1, 2 and L of each answer, in percent.

    Raises:
        ConfigError: the libraries are not installed.
    """
    sacrebleu = need("sacrebleu", "evaluate")
    scorer = need("rouge_score.rouge_scorer", "evaluate").RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    rouge = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {
        "bleu": [
            sacrebleu.sentence_bleu(answer, [reference]).score
            for answer, reference in zip(answers, references, strict=True)
        ],
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
