"""Teacher signals of FreeLM (arXiv 2305.01616; FLM-101B, section 2.2): propositions that end in a judgement slot.

A labelled example becomes a true proposition, with its label, and a false proposition, with another label. The slot
holds a mark, one of two emoji that stand for "true" and "false"; the loss is on the mark alone.
"""

import dataclasses
import json
import random
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from flmjax.config import ConfigError, DataConfig, nearest, shorten
from flmjax.data.sources import BUILT_IN as BUILT_IN_TEXTS
from flmjax.data.sources import hsk, text_source
from flmjax.data.sources.documents import Document, Source, as_document, is_held_out, key_bytes
from flmjax.data.sources.files import RECORD_SUFFIXES, Files, find, portable_name, say
from flmjax.data.sources.text_files import BLANK_LINES, json_records, key_of
from flmjax.data.tokenizers import Tokenizer

RESERVOIR = 1000  # second texts of earlier pairs, from which false pairs are drawn
# Least and most characters of a paragraph: a shorter one says too little of its topic, a longer one is cut.
PARAGRAPH = (60, 300)


@dataclasses.dataclass(frozen=True)
class Template:
    """How a labelled example (a mapping of fields) becomes a proposition.

    Attributes:
        text: the proposition, with the example's fields in braces and {label} for the words of the label.
        labels: words of each label; they may have fields in braces too (COPA's two labels are fields). An example
            with another label, as the hidden labels of test sets, makes no proposition.
        label_field: the field that holds the label.
    """

    text: str
    labels: Mapping[str, str]
    label_field: str = "label"

    def words(self, label: str) -> str | None:
        """Words of an example's label; None for a label that the template lacks.

        The words are a label too, capital letters and white space around a label do not count, and 1.0 is 1.
        """
        labels = {**{words: words for words in self.labels.values()}, **self.labels}
        return labels.get(re.sub(r"(?<=\d)\.0+$", "", label.strip().lower()))


_NO_YES = types.MappingProxyType({"0": "no", "1": "yes", "false": "no", "true": "yes"})
_NLI = types.MappingProxyType({"entailment": "entailment", "neutral": "neutral", "contradiction": "contradiction"})
_ZH_NLI = types.MappingProxyType({"entailment": "蕴含", "neutral": "中立", "contradiction": "矛盾"})
_ZH_SAME = types.MappingProxyType({"0": "不同", "1": "相同", "false": "不同", "true": "相同"})

# SuperGLUE: fields and numbers of labels as in TFDS and in the official files. CLUE: as in the official files.
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
# Propositions on pairs of texts: true where the two texts belong together.
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
    """Token ids of the two marks.

    Attributes:
        true, false: ids of each mark, equally many.
        differs: index of the first token in which the marks differ. The judgement is decided at this token.
    """

    true: tuple[int, ...]
    false: tuple[int, ...]
    differs: int


def marks(tokenizer: Tokenizer, data: DataConfig) -> Marks:
    """The marks data.true_mark and data.false_mark in a vocabulary.

    Raises:
        ConfigError: for a mark that the vocabulary cannot spell, and for marks of equal ids or of unequal length.
    """
    ids = []
    for field in ("true_mark", "false_mark"):
        mark = getattr(data, field)
        ids.append(tuple(int(i) for i in tokenizer.encode(mark)))
        if tokenizer.decode(ids[-1]) != mark:
            raise ConfigError(
                f"data.{field}='{mark}' has no spelling in the vocabulary of {tokenizer.vocab_size:,} ids"
            )
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
    """A true and a false proposition of a labelled example; none for null and for a label that the template lacks.

    Both have the same key: the example's field "key", or the text without the label.

    Raises:
        ConfigError: if the example lacks a field of the template; names that field and the example's fields.
    """
    if example.get(template.label_field, "") is None:
        return
    example = _flat(example)
    if template.label_field not in example:
        raise ConfigError(f"an example has no field '{template.label_field}'{nearest(template.label_field, example)}")
    right = template.words(example[template.label_field])
    if right is None:
        return
    wrong = sorted({word for word in template.labels.values() if word != right})
    try:
        key = example.get("key", template.text.format(**{**example, "label": ""}))
        yield Document(template.text.format(**{**example, "label": right.format(**example)}), key, True)
        word = random.Random(template.text.format(**{**example, "label": ""})).choice(wrong)
        yield Document(template.text.format(**{**example, "label": word.format(**example)}), key, False)
    except KeyError as error:
        raise ConfigError(f"an example has no field {error}; it has: {', '.join(sorted(example))}") from None


def judged_examples(
    examples: Iterable[tuple[str, Mapping[str, Any]]], template: Template, source: str
) -> Iterator[Document]:
    """The propositions of labelled examples; in place of an example without a usable label, one without text.

    Standard error says at the end how many examples have no usable label.

    Args:
        examples: pairs of a place, for messages, and the fields of an example.
        source: its name, for messages.

    Raises:
        ConfigError: naming the place of an example that lacks a field; if no example has a usable label.
    """
    count = unusable = 0
    first = ""
    for place, example in examples:
        count += 1
        try:
            documents = list(propositions(example, template))
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        if not documents:
            unusable += 1
            first = first or f"{place}: {template.label_field}={shorten(example.get(template.label_field))}"
        yield from documents or [Document("", judgement=True)]
    if unusable:
        line = (
            f"{unusable:,} of {count:,} examples have no usable label and are left out (first: {first}; "
            f"labels: {', '.join(template.labels)})"
        )
        if unusable == count:
            raise ConfigError(line)
        say(f"{source}: {line}")


def judged_pairs(pairs: Iterable[tuple[str, str, str]], text: str, fraction: float) -> Iterator[Document]:
    """For every pair (key, first, second) a true proposition, and a false one with the second text of an earlier pair.

    The earlier pair is of the same split, so that no held-out text occurs in training.

    Args:
        text: the proposition, with {first} and {second}.
        fraction: data.validation_fraction, which decides the split of a key.
    """
    earlier: dict[bool, list[str]] = {False: [], True: []}  # second texts, by whether they are held out
    for key, first, second in pairs:
        chance = random.Random(f"{key}\n{first}\n{second}")  # seeded by a str, which is the same in every process
        others = earlier[is_held_out(key_bytes(key), fraction)]
        yield Document(text.format(first=first, second=second), key, True)
        if others and (other := chance.choice(others)) != second:
            yield Document(text.format(first=first, second=other), key, False)
        if len(others) < RESERVOIR:
            others.append(second)
        else:
            others[chance.randrange(RESERVOIR)] = second


def template_and_path(name: str) -> tuple[str, str]:
    """The two parts of an entry of `data.teachers`; the first is empty for an entry without a template."""
    kind, colon, path = name.partition(":")
    return (kind, path) if colon and kind in (*TEMPLATES, *PAIRS) else ("", name)


def teacher_name(name: str) -> str:
    """The one spelling of an entry of `data.teachers`."""
    kind, path = template_and_path(name)
    if kind:
        return f"{kind}:{portable_name(path, BUILT_IN_TEXTS)}"
    plain = portable_name(path, BUILT_IN)
    return f"./{plain}" if template_and_path(plain)[0] else plain


def teacher_source(name: str, data: DataConfig) -> Source:
    """The source that an entry of `data.teachers` names.

    An entry is one of:
        a name in BUILT_IN;
        `translation:FILES`: files of JSON records with two texts;
        `topic:SOURCE`: paragraphs of any entry of data.sources;
        `TEMPLATE:FILES`: files of JSON records with the fields of a template in TEMPLATES;
        `FILES`: files of JSON records with "proposition" and "judgement" (true or false).
    FILES is a file, a folder or a glob; the suffixes .jsonl, .ndjson and .json are read from a folder.

    Raises:
        ConfigError: for an unknown template (with the nearest names), and for files that do not exist.
    """
    kind, colon, rest = name.partition(":")
    if name in BUILT_IN:
        BUILT_IN[name](data.validation_fraction)  # a missing package is named at once; no document is read
        return Source(name, lambda: BUILT_IN[name](data.validation_fraction), True, stamp=name)
    if kind == "topic" and colon:
        text = text_source(rest, data.split_by, "data.teachers")
        pairs = lambda: judged_pairs(_paragraph_pairs(text), PAIRS["topic"], data.validation_fraction)
        return dataclasses.replace(text, name=teacher_name(name), read=pairs, is_teacher=True)
    if colon and kind not in (*TEMPLATES, *PAIRS):
        raise ConfigError(f"data.teachers: there is no template '{kind}'{nearest(kind, [*TEMPLATES, *PAIRS])}")
    path, names = (rest, ()) if colon else (name, tuple(BUILT_IN))
    files = find(path, names, "data.teachers", RECORD_SUFFIXES)
    read: Callable[[], Iterator[Document]]
    if not colon:
        read = lambda: _judged_lines(files)
    elif kind == "translation":
        read = lambda: judged_pairs(_line_pairs(files), PAIRS["translation"], data.validation_fraction)
    else:
        read = lambda: judged_examples(_labelled(files), TEMPLATES[kind], f"'{teacher_name(name)}'")
    return Source(teacher_name(name), read, True, files.stamp(), files)


def _judged_lines(files: Files) -> Iterator[Document]:
    for place, record in json_records(files):
        proposition, judgement = record.get("proposition"), record.get("judgement")
        if not isinstance(proposition, str) or not isinstance(judgement, bool):
            raise ConfigError(f'{place}: a teacher\'s line needs "proposition": a text, and "judgement": true or false')
        yield Document(proposition, key_of(record, place, None), judgement)


def _labelled(files: Files) -> Iterator[tuple[str, dict[str, Any]]]:
    for place, record in json_records(files):
        yield place, {**record, "key": key_of(record, place, None)}


def _line_pairs(files: Files) -> Iterator[tuple[str, str, str]]:
    for place, record in json_records(files):
        texts = [value for name, value in record.items() if isinstance(value, str) and name not in ("key", "id")]
        if len(texts) != 2:
            raise ConfigError(f"{place}: a pair needs two texts, not {len(texts)}")
        yield key_of(record, place, "\n".join(texts)) or "", texts[0], texts[1]


def _paragraph_pairs(source: Source) -> Iterator[tuple[str, str, str]]:
    """(key, first, second): two paragraphs of every document that has two or more.

    Raises:
        ConfigError: at the end, if no document has two paragraphs.
    """
    documents = pairs = 0
    for text, key, *_ in map(as_document, source.read()):
        documents += bool(text.strip())
        paragraphs = [p.strip()[: PARAGRAPH[1]] for p in BLANK_LINES.split(text)]
        paragraphs = [p for p in paragraphs if len(p) >= PARAGRAPH[0]]
        if len(paragraphs) >= 2:
            pairs += 1
            first, second = random.Random(text).sample(paragraphs, 2)
            yield text if key is None else key, first, second
    if documents and not pairs:
        raise ConfigError(
            f"none of the {documents:,} documents of '{source.name}' has two paragraphs of {PARAGRAPH[0]} characters "
            "or more; a blank line ends a paragraph, two blank lines end a document"
        )


def _flat(example: Mapping[str, Any]) -> dict[str, str]:
    """The fields of an example as text: fields of a nested mapping join the others, items of a list are joined."""
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
