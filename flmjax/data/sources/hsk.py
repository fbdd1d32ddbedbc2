"""Chinese sentences with English translations, graded from beginner to advanced, from one optional package."""

import importlib
import random
from collections.abc import Iterator

from flmjax.config import ConfigError
from flmjax.data.sources.documents import Document

PAIRS_PER_DOCUMENT = 8  # about 8 x (26 + 28) = 430 bytes


def documents() -> Iterator[Document]:
    """4,354 sentence pairs of PyPI `hsk-sentences-audio`, 0.25 MB; a document has about 8 pairs of one level and topic.

    A pair is two lines, the Chinese and the English; pairs are parted by a blank line. The sentences are short and
    everyday, good enough to see a bilingual model learn and too few to make a good one. The data are licensed
    CC-BY-SA-4.0 (contributors of hsk-sentences-audio): keep the attribution when you pass on text or token files.

    Raises:
        ConfigError: when the package is not installed.
    """
    for _, key, group in _groups():
        yield Document("\n\n".join(f"{chinese}\n{english}" for chinese, english in group), key)


def translations() -> Iterator[tuple[str, str, str]]:
    """(key, Chinese, English); the key is that of the document that has the pair, so that both are on one side.

    Raises:
        ConfigError: when the package is not installed.
    """
    for _, key, group in _groups():
        for chinese, english in group:
            yield key, chinese, english


def levels() -> Iterator[dict[str, str]]:
    """Examples with "key" (as for translations), "sentence" and "label": Chinese of levels 1 to 3, "beginners", and of
    5 and 6, "advanced learners"; as many of each, so that the label alone says nothing, in random order.

    Raises:
        ConfigError: when the package is not installed.
    """
    by_label: dict[str, list[dict[str, str]]] = {"beginners": [], "advanced learners": []}
    for level, key, group in _groups():
        if level != 4:
            label = "beginners" if level < 4 else "advanced learners"
            by_label[label] += [{"key": key, "sentence": chinese, "label": label} for chinese, _ in group]
    order = random.Random(0)
    count = min(map(len, by_label.values()))
    found = [example for examples in by_label.values() for example in order.sample(examples, count)]
    order.shuffle(found)
    yield from found


def _groups() -> Iterator[tuple[int, str, list[tuple[str, str]]]]:
    try:
        package = importlib.import_module("hsk_sentences_audio")
    except ModuleNotFoundError:
        raise ConfigError("'hsk' needs a package; pip install 'flmjax[data]'") from None
    groups: dict[tuple[int, str], dict[tuple[str, str], None]] = {}  # an inner dict: an ordered set
    for sentence in package.iter_sentences():
        pair = sentence["chinese"], sentence["translation"]["en"]
        groups.setdefault((sentence["hsk_level"], sentence["topic"]), {})[pair] = None
    for (level, topic), group in groups.items():
        ordered = list(group)
        parts = max(1, round(len(ordered) / PAIRS_PER_DOCUMENT))
        for i in range(parts):
            part = ordered[i * len(ordered) // parts : (i + 1) * len(ordered) // parts]
            yield level, f"hsk {level} {topic} {i}", part
