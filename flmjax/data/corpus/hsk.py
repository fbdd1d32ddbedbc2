"""Chinese sentences with English translations, graded from beginner to advanced, from one optional package."""

import importlib
from collections.abc import Iterator

from flmjax.config import ConfigError

PAIRS_PER_DOCUMENT = 8  # about 8 x (26 + 28) = 430 bytes


def documents() -> Iterator[str]:
    """4,354 sentence pairs of PyPI `hsk-sentences-audio`, 0.25 MB; a document has about 8 pairs of one level and topic.

    A pair is two lines, the Chinese and the English; pairs are parted by a blank line. The sentences are short and
    everyday, good enough to see a bilingual model learn and too few to make a good one. The data are licensed
    CC-BY-SA-4.0 (contributors of hsk-sentences-audio): keep the attribution when you pass on text or token files.

    Raises:
        ConfigError: when the package is not installed.
    """
    try:
        package = importlib.import_module("hsk_sentences_audio")
    except ModuleNotFoundError:
        raise ConfigError("data.sources: 'hsk' needs a package; pip install 'flmjax[data]'") from None
    groups: dict[tuple[int, str], dict[str, None]] = {}  # an inner dict: an ordered set
    for sentence in package.iter_sentences():
        pair = f"{sentence['chinese']}\n{sentence['translation']['en']}"
        groups.setdefault((sentence["hsk_level"], sentence["topic"]), {})[pair] = None
    for group in groups.values():
        pairs = list(group)
        parts = max(1, round(len(pairs) / PAIRS_PER_DOCUMENT))
        for i in range(parts):
            yield "\n\n".join(pairs[i * len(pairs) // parts : (i + 1) * len(pairs) // parts])
