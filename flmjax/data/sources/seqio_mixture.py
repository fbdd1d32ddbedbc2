"""A registered seqio Task or Mixture as sources of documents, which `data.mixture` names.

A Task yields text, not token ids: its preprocessors run in seqio up to seqio.preprocessors.tokenize, and flmjax
tokenises the text as it does that of every source, outside TensorFlow.
"""

import contextlib
import functools
import importlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flmjax.config import ConfigError, DataConfig, nearest
from flmjax.data.sources.documents import Document, Source
from flmjax.data.sources.seqio_tasks import HAS_JUDGEMENTS, Cl100kVocabulary, seqio, tf
from flmjax.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, Tokenizer

SEED = 0  # of preprocessors that draw random numbers, so that the documents are the same at every reading
TOKENIZE = (seqio.preprocessors.tokenize, seqio.preprocessors.tokenize_and_append_eos)
APPEND_EOS = (seqio.preprocessors.append_eos, seqio.preprocessors.append_eos_after_trim)


class Mixture(NamedTuple):
    """The sources of a registered Task or Mixture.

    Attributes:
        sources: one for each Task, in the order of their names.
        rates: shares of the samples, one for each Task; they need not add up to 1.
        vocabulary: the vocabulary of the Tasks; None if no Task has one.
        provenance: what meta.json says of the mixture: version of seqio, Tasks, rates and data sources.
    """

    sources: tuple[Source, ...]
    rates: tuple[float, ...]
    vocabulary: Tokenizer | None
    provenance: dict[str, Any]


def read_mixture(data: DataConfig) -> Mixture:
    """The Task or Mixture `data.mixture`, after the import of `data.task_module`.

    Mixtures within a Mixture are flattened to their Tasks. The text of an element is its "targets", preceded by its
    "inputs" and a line break if it has inputs; an element with a "judgement" (0 or 1) is a teacher's proposition. A
    Task with the splits "train" and "validation" keeps them. In a Task with "train" alone, documents are held out by
    the hash of their "key" or "id", or of their text if they have neither. The Tasks' vocabulary is read only if
    `data.vocabulary` is None; a Task that passes text through agrees with any vocabulary. Memory holds one document at
    a time and seqio's buffers.

    Raises:
        ConfigError: naming data.task_module if it cannot be imported; data.mixture if it is unknown (with the nearest
            names); or a Task whose rate is not positive, whose split "train" is missing or empty, whose targets are no
            text, which does more after tokenising than end the text, or whose vocabulary is of an unknown kind or
            differs from that of the Tasks before it.
    """
    mixture = _registered(data)
    tasks = seqio.get_subtasks(mixture)
    try:
        rates = tuple(_rate(mixture, task) for task in tasks)
        vocabulary = _vocabulary(tasks) if data.vocabulary is None else None
        sources = tuple(_source(task) for task in tasks)
    except ConfigError as error:
        raise ConfigError(f"data.mixture: {error}") from error
    described = [
        {"task": task.name, "rate": rate, "source": str(task.source)} for task, rate in zip(tasks, rates, strict=True)
    ]
    provenance = {"seqio": seqio.__version__, "mixture": data.mixture, "tasks": described}
    return Mixture(sources, rates, vocabulary, provenance)


def has_judgements(data: DataConfig) -> bool | None:
    """Whether a Task of the mixture `data.mixture` has judgements; None if only its data set could tell.

    No data set is read or downloaded.

    Raises:
        ConfigError: naming data.task_module if it cannot be imported, or data.mixture if it is unknown.
    """
    judged = [_has_judgements(task) for task in seqio.get_subtasks(_registered(data))]
    return True if True in judged else None if None in judged else False


def _has_judgements(task: seqio.Task) -> bool | None:
    for step in task.preprocessors:
        if step in HAS_JUDGEMENTS:
            return HAS_JUDGEMENTS[step]
    if isinstance(task.source, seqio.TfdsDataSource):  # would be downloaded
        return None
    try:
        return "judgement" in _dataset(task, "train").element_spec
    except Exception:  # whatever the Task's code raises where its files are missing
        return None


def _registered(data: DataConfig) -> Any:
    """The seqio Task or Mixture `data.mixture`."""
    if data.task_module is not None:
        _import(data.task_module)
    names = {*seqio.MixtureRegistry.names(), *seqio.TaskRegistry.names()}
    if data.mixture is None or data.mixture not in names:
        raise ConfigError(
            f"data.mixture: there is no Task or Mixture '{data.mixture}'{nearest(str(data.mixture), names)}"
        )
    return seqio.get_mixture_or_task(data.mixture)


def _import(module: str) -> None:
    folder = os.getcwd()
    sys.path.insert(0, folder)  # the path of a console script lacks the current directory
    try:
        importlib.import_module(module)
    except Exception as error:
        raise ConfigError(f"data.task_module='{module}' cannot be imported: {_cause(error)}") from error
    finally:
        sys.path.remove(folder)


def _rate(mixture: seqio.Mixture | seqio.Task, task: seqio.Task) -> float:
    """The rate of a Task in a Mixture; 1 for a Task that stands alone."""
    with _naming(task):
        rate = 1.0 if mixture is task else float(mixture.get_rate(task))
        if not (math.isfinite(rate) and rate > 0):
            raise ConfigError(f"its rate in '{mixture.name}' is {rate}, but must be positive")
    return rate


@contextlib.contextmanager
def _naming(task: seqio.Task) -> Iterator[None]:
    """Turns every error, also one of a Task's preprocessors, into one line that begins with the Task's name."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"task '{task.name}': {_cause(error)}") from error


def _cause(error: Exception) -> str:
    """An error in one line; if TensorFlow has wrapped another error, that error."""
    text = re.sub(r"\{\{.*?\}\}\s*", "", str(error)).strip()
    if isinstance(error, ConfigError):
        return text
    if wrapped := re.search(r"ConfigError: (.+)", text):
        return wrapped[1]
    lines = text.splitlines() or [""]
    if lines[0].startswith("in user code"):  # a traceback follows, and its last line is the error
        return lines[-1].strip()
    return f"{type(error).__name__}: {lines[0]}"


# ---- text of a Task --------------------------------------------------------------------------------------------------


def _source(task: seqio.Task) -> Source:
    with _naming(task):
        splits = list(task.splits)
        if "train" not in splits:
            raise ConfigError(f"it has no split 'train'; its splits: {', '.join(splits)}")
        dataset = _dataset(task, "train")
        if next(iter(dataset.take(1)), None) is None:
            raise ConfigError(f"its split 'train' is empty; its splits: {', '.join(splits)}")
    return Source(task.name, functools.partial(_documents, task), "judgement" in dataset.element_spec)


def _documents(task: seqio.Task) -> Iterator[Document]:
    has_validation = "validation" in task.splits
    for split in ("train", "validation") if has_validation else ("train",):
        with _naming(task):
            for element in _dataset(task, split).as_numpy_iterator():
                yield _document(element, split if has_validation else None)


def _document(element: Mapping[str, Any], split: str | None) -> Document:
    inputs, targets = (element.get(name, b"").decode("utf-8") for name in ("inputs", "targets"))
    key = element.get("key", b"").decode("utf-8", "surrogateescape")  # may be the path of a file
    judgement = element.get("judgement")
    if judgement not in (None, 0, 1):
        raise ConfigError(f"the judgement of {targets[:40]!r} is {judgement}, which is neither 0 nor 1")
    text = f"{inputs}\n{targets}" if inputs else targets
    return Document(text, key or None, None if judgement is None else bool(judgement), split)


def _dataset(task: seqio.Task, split: str) -> tf.data.Dataset:
    """A split in a fixed order: "targets" and, if the Task has them, "inputs", "key" and "judgement"."""
    tf.random.set_seed(SEED)
    dataset = task.source.get_dataset(split=split, shuffle=False)
    for step in _steps_to_text(task):
        step = seqio.utils.add_kwargs_to_transform(step, sequence_length=None, output_features=task.output_features)
        dataset = step(dataset)
    spec = dataset.element_spec
    if not isinstance(spec, Mapping) or "targets" not in spec:
        raise ConfigError("its elements have no feature 'targets'")
    is_text = lambda name: spec[name] == tf.TensorSpec((), tf.string)
    kept = {name: name for name in ("inputs", "targets", "judgement") if name in spec}
    for name in ("inputs", "targets"):
        if name in spec and not is_text(name):
            raise ConfigError(f"its {name} are {spec[name]}, not text; flmjax tokenises text itself")
    if key := next((name for name in ("key", "id") if name in spec and is_text(name)), None):
        kept["key"] = key
    options = tf.data.Options()
    options.deterministic = True  # parallel maps keep the order
    return dataset.map(lambda element: {new: element[old] for new, old in kept.items()}).with_options(options)


def _steps_to_text(task: seqio.Task) -> list[Callable[..., Any]]:
    """The preprocessors of a Task before it tokenises."""
    steps = [step for step in task.preprocessors if not isinstance(step, seqio.CacheDatasetPlaceholder)]
    functions = [_function_of(step) for step in steps]
    tokenize = next((i for i, function in enumerate(functions) if function in TOKENIZE), len(steps))
    for function in functions[tokenize + 1 :]:
        if function not in APPEND_EOS:
            name = getattr(function, "__name__", type(function).__name__)
            raise ConfigError(f"its preprocessor {name} comes after tokenize, but flmjax tokenises text itself")
    return steps[:tokenize]


def _function_of(step: Callable[..., Any]) -> Callable[..., Any]:
    return _function_of(step.func) if isinstance(step, functools.partial) else step


# ---- vocabularies ----------------------------------------------------------------------------------------------------


def _vocabulary(tasks: Sequence[seqio.Task]) -> Tokenizer | None:
    """The vocabulary that all Tasks with a vocabulary share."""
    first: str | None = None
    shared: Tokenizer | None = None
    for task in tasks:
        with _naming(task):
            tokenizer = _tokenizer(task)
            if tokenizer is None:
                continue
            if shared is not None and shared.fingerprint != tokenizer.fingerprint:
                raise ConfigError(f"its vocabulary is not that of task '{first}'; set data.vocabulary")
        first, shared = task.name, tokenizer
    return shared


def _tokenizer(task: seqio.Task) -> Tokenizer | None:
    """The tokenizer with the ids of a Task's vocabulary; None for a Task that passes text through."""
    if "targets" not in task.output_features:
        raise ConfigError("its output_features lack 'targets'")
    vocabulary = task.output_features["targets"].vocabulary
    match vocabulary:
        case seqio.PassThroughVocabulary():
            return None
        case seqio.SentencePieceVocabulary():
            if vocabulary.eos_id == -1:
                raise ConfigError(
                    f"its SentencePiece model has no end-of-sentence piece; set data.end_id and "
                    f"data.vocabulary='{vocabulary.sentencepiece_model_file}'"
                )
            return SentencePieceTokenizer(vocabulary.sp_model, vocabulary.eos_id)
        case seqio.ByteVocabulary():
            return ByteTokenizer(3, 1, vocabulary.vocab_size)
        case Cl100kVocabulary():
            return vocabulary.tokenizer
    raise ConfigError(
        f"its vocabulary is a {type(vocabulary).__name__}; those that can be read are SentencePieceVocabulary, "
        "ByteVocabulary, flmjax.data.sources.seqio_tasks.Cl100kVocabulary and PassThroughVocabulary, or set "
        "data.vocabulary"
    )
