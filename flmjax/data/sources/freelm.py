"""Teacher signals of FreeLM (arXiv 2305.01616; FLM-101B, section 2.2): propositions that end in a judgement slot.

A labelled example becomes a true proposition, with its label, and a false one, with another label. What stands in the
slot is a mark, one of two emoji; the loss is on the mark alone.
"""

import dataclasses
import json
import random
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from flmjax.config import ConfigError, DataConfig, nearest
from flmjax.data.sources import hsk, source_files, text_source
from flmjax.data.sources.documents import Document, Source, is_held_out
from flmjax.data.sources.text_files import json_lines, row_key, stamp
from flmjax.data.tokenizers import Tokenizer

RESERVOIR = 1000  # earlier partners that a false pair is drawn from
PARAGRAPH = (60, 300)  # characters: shorter paragraphs say too little of their topic, longer ones are cut


@dataclasses.dataclass(frozen=True)
class Template:
    """How an example (a mapping of fields) with a label becomes a proposition.

    `text` has the example's fields in braces and, as {label}, what `labels` makes of the label; what it makes may have
    fields too (COPA's labels are two fields). An example whose label `labels` lacks (hidden in test sets) is left out.
    """

    text: str
    labels: Mapping[str, str]
    label_field: str = "label"


_NO_YES = types.MappingProxyType({"0": "no", "1": "yes", "false": "no", "true": "yes"})
_NLI = types.MappingProxyType({"entailment": "entailment", "neutral": "neutral", "contradiction": "contradiction"})
_ZH_NLI = types.MappingProxyType({"entailment": "蕴含", "neutral": "中立", "contradiction": "矛盾"})
_ZH_SAME = types.MappingProxyType({"0": "不同", "1": "相同"})

# SuperGLUE's with the fields and numbers of TFDS and of the official files, CLUE's with those of the official files.
TEMPLATES: dict[str, Template] = {
    "boolq": Template("{passage}\nQuestion: {question}?\nAnswer: {label}\nJudgement:", _NO_YES),
    "rte": Template(
        "Premise: {premise}\nHypothesis: {hypothesis}\nRelation: {label}\nJudgement:",
        {"0": "entailment", "1": "not entailment", "entailment": "entailment", "not_entailment": "not entailment"},
    ),
    "cb": Template(
        "Premise: {premise}\nHypothesis: {hypothesis}\nRelation: {label}\nJudgement:",
        {"0": "entailment", "1": "contradiction", "2": "neutral", **_NLI},
    ),
    "wic": Template("{sentence1}\n{sentence2}\nIs '{word}' used in the same sense? {label}\nJudgement:", _NO_YES),
    "wsc": Template("{text}\nDoes '{span2_text}' stand for '{span1_text}'? {label}\nJudgement:", _NO_YES),
    "copa": Template("{premise}\nThe {question}: {label}\nJudgement:", {"0": "{choice1}", "1": "{choice2}"}),
    "afqmc": Template("句子1：{sentence1}\n句子2：{sentence2}\n两句话的意思{label}\n判断：", _ZH_SAME),
    "ocnli": Template("前提：{sentence1}\n假设：{sentence2}\n关系：{label}\n判断：", _ZH_NLI),
    "csl": Template("摘要：{abst}\n关键词：{keyword}\n关键词{label}\n判断：", {"0": "不符合摘要", "1": "符合摘要"}),
    "cluewsc": Template(
        "{text}\n“{span2_text}”指的是“{span1_text}”吗？{label}\n判断：", {"false": "不是", "true": "是"}
    ),
}
# Self-made from pairs: true where they belong together.
PAIRS = {
    "translation": "{first}\n{second}\nIs the second a translation of the first?\nJudgement:",
    "topic": "{first}\n\n{second}\n\nAre the two of one text?\nJudgement:",
}
LEVELS = Template(
    "{sentence}\nThis is for {label}.\nJudgement:",
    {"beginners": "beginners", "advanced learners": "advanced learners"},
)
BUILT_IN: dict[str, Callable[[float], Iterator[Document]]] = {
    "hsk_translations": lambda fraction: judged_pairs(hsk.translations(), PAIRS["translation"], fraction),
    "hsk_levels": lambda _: (d for example in hsk.levels() for d in propositions(example, LEVELS)),
}


class Marks(NamedTuple):
    """Ids of the two marks, equally many; `differs` is the first place where they are not the same: it decides."""

    true: tuple[int, ...]
    false: tuple[int, ...]
    differs: int


def marks(tokenizer: Tokenizer, data: DataConfig) -> Marks:
    """The marks of `data` in a vocabulary.

    Raises:
        ConfigError: for a mark that the vocabulary cannot spell, or marks of equal ids or of unequal length.
    """
    ids = []
    for field in ("true_mark", "false_mark"):
        mark = getattr(data, field)
        ids.append(tuple(int(i) for i in tokenizer.encode(mark)))
        if tokenizer.decode(ids[-1]) != mark:
            raise ConfigError(f"data.{field}='{mark}' is missing from the vocabulary, which has {tokenizer.vocab_size}")
    true, false = ids
    if len(true) != len(false):
        raise ConfigError(
            f"data.true_mark='{data.true_mark}' has {len(true)} tokens {list(true)}, data.false_mark="
            f"'{data.false_mark}' has {len(false)} {list(false)}; take marks of one length"
        )
    if true == false:
        raise ConfigError(f"data.true_mark='{data.true_mark}' and data.false_mark='{data.false_mark}' have equal ids")
    return Marks(true, false, next(i for i in range(len(true)) if true[i] != false[i]))


def propositions(example: Mapping[str, Any], template: Template) -> Iterator[Document]:
    """A true and a false proposition of a labelled example; nothing for a label that is not known.

    Both have one key: the example's field "key", or its text without the label.

    Raises:
        ConfigError: when the example lacks a field of the template; names it and those that are there.
    """
    example = _flat(example)
    if template.label_field not in example:
        raise ConfigError(f"an example has no field '{template.label_field}'{nearest(template.label_field, example)}")
    label = example[template.label_field].lower()
    if label not in template.labels:
        return
    right = template.labels[label]
    wrong = sorted({word for word in template.labels.values() if word != right})
    try:
        key = example.get("key") or template.text.format(**{**example, "label": ""})
        yield Document(template.text.format(**{**example, "label": right.format(**example)}), key, True)
        word = random.Random(template.text.format(**{**example, "label": ""})).choice(wrong)
        yield Document(template.text.format(**{**example, "label": word.format(**example)}), key, False)
    except KeyError as error:
        raise ConfigError(f"an example has no field {error}; it has: {', '.join(sorted(example))}") from None


def judged_pairs(pairs: Iterable[tuple[str, str, str]], text: str, fraction: float) -> Iterator[Document]:
    """For every (key, first, second) a true proposition, and a false one with the second of an earlier pair.

    That one is of the same side of the split at `fraction`, so that no held-out text is seen in training. `text` has
    {first} and {second}.
    """
    earlier: dict[bool, list[str]] = {False: [], True: []}
    for key, first, second in pairs:
        chance = random.Random(f"{key}\n{first}\n{second}")  # of a str: the same in every process
        others = earlier[is_held_out(key.encode(), fraction)]
        yield Document(text.format(first=first, second=second), key, True)
        if others and (other := chance.choice(others)) != second:
            yield Document(text.format(first=first, second=other), key, False)
        if len(others) < RESERVOIR:
            others.append(second)
        else:
            others[chance.randrange(RESERVOIR)] = second


def teacher_source(name: str, data: DataConfig) -> Source:
    """The source that an entry of `data.teachers` means.

    A built-in name (BUILT_IN); `translation:FILES` (.jsonl, two texts a line); `topic:SOURCE` (any entry of
    data.sources); `TEMPLATE:FILES` (.jsonl with the template's fields, see TEMPLATES); or FILES alone: .jsonl with
    "proposition" and "judgement" (true or false).

    Raises:
        ConfigError: for an unknown template (nearest names) or files that are not there.
    """
    kind, colon, rest = name.partition(":")
    read: Callable[[], Iterator[Document]]
    if name in BUILT_IN:
        return Source(name, lambda: BUILT_IN[name](data.validation_fraction), True, stamp=name)
    if not colon:
        files = source_files(name, "data.teachers", BUILT_IN)
        return Source(name, lambda: _given(files), True, stamp(files))
    if kind == "topic":
        source = text_source(rest, data.split_by, "data.teachers")
        read = lambda: judged_pairs(_same_text(source), PAIRS["topic"], data.validation_fraction)
        return Source(name, read, True, source.stamp)
    if kind == "translation":
        files = source_files(rest, "data.teachers")
        read = lambda: judged_pairs(_two_texts(files), PAIRS["translation"], data.validation_fraction)
        return Source(name, read, True, stamp(files))
    if kind not in TEMPLATES:
        raise ConfigError(f"data.teachers: there is no template '{kind}'{nearest(kind, [*TEMPLATES, *PAIRS])}")
    files = source_files(rest, "data.teachers")
    return Source(name, lambda: _labelled(files, TEMPLATES[kind]), True, stamp(files))


def _given(files: Any) -> Iterator[Document]:
    for where, row in json_lines(files):
        proposition, judgement = row.get("proposition"), row.get("judgement")
        if not isinstance(proposition, str) or not isinstance(judgement, bool):
            raise ConfigError(f'{where}: a teacher\'s line needs "proposition": a text, and "judgement": true or false')
        yield Document(proposition, row_key(row, where, None), judgement)


def _labelled(files: Any, template: Template) -> Iterator[Document]:
    for where, row in json_lines(files):
        try:
            yield from propositions(row, template)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from None


def _two_texts(files: Any) -> Iterator[tuple[str, str, str]]:
    for where, row in json_lines(files):
        texts = [value for name, value in row.items() if isinstance(value, str) and name not in ("key", "id")]
        if len(texts) != 2:
            raise ConfigError(f"{where}: a pair needs two texts, not {len(texts)}")
        yield row_key(row, where, "\n".join(texts)) or "", texts[0], texts[1]


def _same_text(source: Source) -> Iterator[tuple[str, str, str]]:
    """Two paragraphs of every document that has two."""
    for document in source.read():
        text, key = (document, None) if isinstance(document, str) else document[:2]
        paragraphs = [p.strip()[: PARAGRAPH[1]] for p in text.split("\n\n")]
        paragraphs = [p for p in paragraphs if len(p) >= PARAGRAPH[0]]
        if len(paragraphs) >= 2:
            first, second = random.Random(text).sample(paragraphs, 2)
            yield text if key is None else key, first, second


def _flat(example: Mapping[str, Any]) -> dict[str, str]:
    """Fields as text; those of a field that is a mapping stand beside it, a list's items are joined."""
    flat: dict[str, str] = {}
    for name, value in example.items():
        if value is None:
            continue
        if isinstance(value, Mapping):
            flat |= _flat(value)
        elif isinstance(value, list | tuple):
            flat[name] = "、".join(str(item) for item in value)
        elif isinstance(value, bool):
            flat[name] = json.dumps(value)
        else:
            flat[name] = value.decode() if isinstance(value, bytes) else str(value)
    return flat
