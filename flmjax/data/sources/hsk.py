"""Chinese sentences with English translations, graded from beginner to advanced; they come with an optional package."""

import importlib
import random
from collections.abc import Iterable, Iterator
from types import ModuleType

from flmjax.config import ConfigError
from flmjax.data.sources.documents import Document

PAIRS_PER_DOCUMENT = 8  # about 8 x (26 + 28) = 430 bytes


def documents() -> Iterator[Document]:
    """4,354 sentence pairs of PyPI `hsk-sentences-audio`, 0.25 MB; a document has about 8 pairs of one level and topic.

    A pair is two lines, the Chinese and the English; a blank line separates pairs. The sentences are short and
    everyday: enough to see a bilingual model learn, too few for a good model. The data are licensed CC-BY-SA-4.0
    (contributors of hsk-sentences-audio): keep the attribution when you pass on text or token files.

    Raises:
        ConfigError: when the package is not installed.
    """
    text = lambda group: "\n\n".join(f"{chinese}\n{english}" for chinese, english in group)
    return (Document(text(group), key) for _, key, group in _groups())


def translations() -> Iterator[tuple[str, str, str]]:
    """Triples (key, Chinese, English) with the key of the pair's document, so that both go to the same split.

    Raises:
        ConfigError: when the package is not installed.
    """
    return ((key, chinese, english) for _, key, group in _groups() for chinese, english in group)


def levels() -> Iterator[dict[str, str]]:
    """Labelled examples in random order: "sentence" (Chinese), "label" and "key" (as in `translations`).

    The label is "beginners" for levels 1 to 3 and "advanced learners" for levels 5 and 6. Both labels are equally
    frequent, so that the label alone says nothing of the judgement.

    Raises:
        ConfigError: when the package is not installed.
    """
    return _balanced(_groups())


def _balanced(groups: Iterable[tuple[int, str, list[tuple[str, str]]]]) -> Iterator[dict[str, str]]:
    by_label: dict[str, list[dict[str, str]]] = {"beginners": [], "advanced learners": []}
    for level, key, group in groups:
        if level != 4:
            label = "beginners" if level < 4 else "advanced learners"
            by_label[label] += [{"key": key, "sentence": chinese, "label": label} for chinese, _ in group]
    order = random.Random(0)
    count = min(map(len, by_label.values()))
    balanced = [example for examples in by_label.values() for example in order.sample(examples, count)]
    order.shuffle(balanced)
    yield from balanced


def _groups() -> Iterator[tuple[int, str, list[tuple[str, str]]]]:
    """(level, key, pairs) of every document; a missing package is an error at once, not at the first document."""
    try:
        package = importlib.import_module("hsk_sentences_audio")
    except ModuleNotFoundError:
        raise ConfigError("'hsk' needs a package; pip install 'flmjax[data]'") from None
    return _documents_of(package)


def _documents_of(package: ModuleType) -> Iterator[tuple[int, str, list[tuple[str, str]]]]:
    groups: dict[tuple[int, str], dict[tuple[str, str], None]] = {}  # an inner dict: an ordered set
    for sentence in package.iter_sentences():
        pair = sentence["chinese"], sentence["translation"]["en"]
        groups.setdefault((sentence["hsk_level"], sentence["topic"]), {})[pair] = None
    for (level, topic), group in groups.items():
        ordered = list(group)
        count = max(1, round(len(ordered) / PAIRS_PER_DOCUMENT))
        for i in range(count):
            pairs = ordered[i * len(ordered) // count : (i + 1) * len(ordered) // count]
            yield level, f"hsk {level} {topic} {i}", pairs
