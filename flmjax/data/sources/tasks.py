"""Text that is defined in seqio: Tasks and Mixtures as documents, helpers to register them, and those of the paper.

A Task gives text here, not ids: what it does up to seqio.preprocessors.tokenize is seqio's work, and its text is then
tokenised as that of any other source, outside TensorFlow. The same Task still runs through seqio alone.
"""

import contextlib
import functools
import importlib
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from flmjax.config import ConfigError, DataConfig, nearest
from flmjax.data.sources import text_source
from flmjax.data.sources.documents import Document, Source
from flmjax.data.sources.freelm import TEMPLATES, Template, propositions
from flmjax.data.tokenizers import ByteTokenizer, Cl100kTokenizer, SentencePieceTokenizer, Tokenizer


@contextlib.contextmanager
def _without_chatter() -> Iterator[None]:
    """Nothing on standard error, where TensorFlow's libraries write of missing GPUs before any log level holds."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with tempfile.TemporaryFile() as nowhere:
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
try:
    with _without_chatter():
        import seqio
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # whoever has used TensorFlow before has decided
            tf.config.set_visible_devices([], "GPU")  # its memory is JAX's
except ImportError as missing:
    raise ConfigError(f"data.mixture needs packages ({missing}); pip install 'flmjax[data]'") from missing

SEED = 0  # of preprocessors that draw: the documents are the same every time
TOKENIZE = (seqio.preprocessors.tokenize, seqio.preprocessors.tokenize_and_append_eos)
APPEND_EOS = (seqio.preprocessors.append_eos, seqio.preprocessors.append_eos_after_trim)


class Mixture(NamedTuple):
    """What a registered Task or Mixture gives: a source per Task, by name, and its rate among them.

    `vocabulary` is the Tasks' own, None if they have none; `provenance` goes to meta.json.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    vocabulary: Tokenizer | None
    provenance: dict[str, Any]


def read_mixture(data: DataConfig) -> Mixture:
    """The Task or Mixture `data.mixture`, after importing `data.task_module`; a Mixture in a Mixture is flattened.

    The text of an element is its "targets", behind its "inputs" and a line break if it has any; with a "judgement"
    (0 or 1) it is a teacher's proposition. A Task with splits "train" and "validation" keeps them; of one with "train"
    alone documents are held out by the hash of their "key" or "id", or of their text if they have none. Memory holds
    one document at a time and seqio's buffers. The Tasks' vocabulary is not looked at where `data.vocabulary` says
    which one to take; a Task that passes text through goes with any.

    Raises:
        ConfigError: naming data.task_module when it cannot be imported, data.mixture when it is unknown (nearest
            names), and the Task whose rate is not positive, whose split "train" is missing or empty, whose targets are
            not text, which does more after tokenising than to end the text, or whose vocabulary is unknown or another
            one than that of the Tasks before.
    """
    mixture = _registered(data)
    tasks = seqio.get_subtasks(mixture)
    try:
        weights = tuple(_rate(mixture, task) for task in tasks)
        vocabulary = _vocabulary(tasks) if data.vocabulary is None else None
        sources = tuple(_source(task) for task in tasks)
    except ConfigError as error:
        raise ConfigError(f"data.mixture: {error}") from error
    described = [
        {"task": task.name, "rate": rate, "source": str(task.source)} for task, rate in zip(tasks, weights, strict=True)
    ]
    provenance = {"seqio": seqio.__version__, "mixture": data.mixture, "tasks": described}
    return Mixture(sources, weights, vocabulary, provenance)


def has_judgements(data: DataConfig) -> bool | None:
    """Whether a Task of the mixture `data.mixture` has judgements; None where its data set alone could tell.

    No data set is read or downloaded.

    Raises:
        ConfigError: naming data.task_module when it cannot be imported, data.mixture when it is unknown.
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
    sys.path.insert(0, folder)  # a console script's path lacks it
    try:
        importlib.import_module(module)
    except Exception as error:
        raise ConfigError(f"data.task_module='{module}' cannot be imported: {_cause(error)}") from error
    finally:
        sys.path.remove(folder)


def _rate(mixture: Any, task: seqio.Task) -> float:
    """The Task's rate in a Mixture; 1 if it stands alone."""
    with _naming(task):
        rate = 1.0 if mixture is task else float(mixture.get_rate(task))
        if not (math.isfinite(rate) and rate > 0):
            raise ConfigError(f"its rate in '{mixture.name}' is {rate}, but must be positive")
    return rate


@contextlib.contextmanager
def _naming(task: seqio.Task) -> Iterator[None]:
    """Whatever goes wrong, in a Task's own code too, is told in one line that begins with the Task."""
    try:
        yield
    except Exception as error:
        raise ConfigError(f"task '{task.name}': {_cause(error)}") from error


def _cause(error: Exception) -> str:
    """One line; of an error that TensorFlow has wrapped, what was wrapped."""
    text = re.sub(r"\{\{.*?\}\}\s*", "", str(error)).strip()
    if isinstance(error, ConfigError):
        return text
    if found := re.search(r"ConfigError: (.+)", text):
        return found[1]
    lines = text.splitlines() or [""]
    if lines[0].startswith("in user code"):  # what follows is a traceback, its last line the error
        return lines[-1].strip()
    return f"{type(error).__name__}: {lines[0]}"


# ---- a Task's text --------------------------------------------------------------------------------------------------


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
    inputs, targets, key = (element.get(name, b"").decode("utf-8") for name in ("inputs", "targets", "key"))
    judgement = element.get("judgement")
    if judgement not in (None, 0, 1):
        raise ConfigError(f"the judgement of {targets[:40]!r} is {judgement}, which is neither 0 nor 1")
    text = f"{inputs}\n{targets}" if inputs else targets
    return Document(text, key or None, None if judgement is None else bool(judgement), split)


def _dataset(task: seqio.Task, split: str) -> tf.data.Dataset:
    """Elements with "targets" and, where the Task has them, "inputs", "key" and "judgement", in one order always."""
    tf.random.set_seed(SEED)
    dataset = task.source.get_dataset(split=split, shuffle=False)
    for step in _steps_to_text(task):
        step = seqio.utils.add_kwargs_to_transform(step, sequence_length=None, output_features=task.output_features)
        dataset = step(dataset)
    spec = dataset.element_spec
    if not isinstance(spec, Mapping) or "targets" not in spec:
        raise ConfigError("its elements have no feature 'targets'")
    is_text = lambda name: spec[name] == tf.TensorSpec((), tf.string)
    keep = {name: name for name in ("inputs", "targets", "judgement") if name in spec}
    for name in ("inputs", "targets"):
        if name in spec and not is_text(name):
            raise ConfigError(f"its {name} are {spec[name]}, not text; flmjax tokenises text itself")
    if key := next((name for name in ("key", "id") if name in spec and is_text(name)), None):
        keep["key"] = key
    options = tf.data.Options()
    options.deterministic = True  # parallel maps keep the order
    return dataset.map(lambda element: {new: element[old] for new, old in keep.items()}).with_options(options)


def _steps_to_text(task: seqio.Task) -> list[Callable]:
    steps = [step for step in task.preprocessors if not isinstance(step, seqio.CacheDatasetPlaceholder)]
    bare = [_bare(step) for step in steps]
    tokenize = next((i for i, step in enumerate(bare) if step in TOKENIZE), len(steps))
    for step in bare[tokenize + 1 :]:
        if step not in APPEND_EOS:
            name = getattr(step, "__name__", type(step).__name__)
            raise ConfigError(f"its preprocessor {name} comes after tokenize, but flmjax tokenises text itself")
    return steps[:tokenize]


def _bare(step: Callable) -> Callable:
    return _bare(step.func) if isinstance(step, functools.partial) else step


# ---- vocabularies ---------------------------------------------------------------------------------------------------


class Cl100kVocabulary(seqio.Vocabulary):
    """OpenAI's cl100k for Tasks that run through seqio alone; its ids are those of Cl100kTokenizer.

    seqio's converters take id 0 for padding wherever they see it, and here that is "!": it gets no loss, and packing
    cuts a token off a document's end for each. What flmjax prepares knows no padding.
    """

    def __init__(self, end_id: int = 100257):
        super().__init__(extra_ids=0)
        self.tokenizer = Cl100kTokenizer(end_id)

    @property
    def bos_id(self) -> None:
        """There is none."""

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""
        return self.tokenizer.end_id

    @property
    def pad_id(self) -> int:
        """The end's, which decodes to nothing."""
        return self.tokenizer.end_id

    @property
    def unk_id(self) -> int:
        """The end's: no text needs it."""
        return self.tokenizer.end_id

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    def _encode(self, s: str) -> list[int]:
        return self.tokenizer.encode(s).tolist()

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def _encode_tf(self, s: tf.Tensor) -> tf.Tensor:
        encode = lambda text: self.tokenizer.encode(text.decode("utf-8")).astype("int32")
        ids = tf.numpy_function(encode, [s], tf.int32)
        ids.set_shape([None])
        return ids

    def _decode_tf(self, ids: tf.Tensor) -> tf.Tensor:
        text = tf.numpy_function(self.tokenizer.decode, [ids], tf.string)
        text.set_shape([])
        return text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cl100kVocabulary) and self.tokenizer.fingerprint == other.tokenizer.fingerprint


def _vocabulary(tasks: Sequence[seqio.Task]) -> Tokenizer | None:
    """The one vocabulary of all Tasks that have one."""
    first, found = None, None
    for task in tasks:
        with _naming(task):
            tokenizer = _tokenizer(task)
            if tokenizer is None:
                continue
            if found is not None and found.fingerprint != tokenizer.fingerprint:
                raise ConfigError(f"its vocabulary is not that of task '{first}'; set data.vocabulary")
        first, found = task.name, tokenizer
    return found


def _tokenizer(task: seqio.Task) -> Tokenizer | None:
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
        "ByteVocabulary, flmjax.data.sources.tasks.Cl100kVocabulary and PassThroughVocabulary, or set data.vocabulary"
    )


# ---- to register Tasks ----------------------------------------------------------------------------------------------

# Whether elements have judgements, by the preprocessor that makes them: known without the data set.
HAS_JUDGEMENTS: dict[Callable, bool] = {}
TEXT = seqio.Feature(seqio.PassThroughVocabulary(size=0), add_eos=False, dtype=tf.string, rank=0)


def local_files_source(files: Mapping[str, str | Sequence[str]], split_by: str = "text") -> seqio.FunctionDataSource:
    """Text files by split: each value is an entry of `data.sources` (a file, a folder, a glob, a name), or several.

    Elements have "text" and "key" (empty if there is none); `split_by` is that of the settings. Files are looked for
    when they are read, relative to the current directory.
    """

    def documents(split: str) -> Iterator[dict[str, str]]:
        entries = files[split]
        for entry in (entries,) if isinstance(entries, str) else entries:
            for given in text_source(entry, split_by, f"split '{split}'").read():
                document = given if isinstance(given, Document) else Document(given)
                yield {"text": document.text, "key": document.key or ""}

    def dataset(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
        signature = {name: tf.TensorSpec((), tf.string) for name in ("text", "key")}
        return tf.data.Dataset.from_generator(functools.partial(documents, split), output_signature=signature)

    return seqio.FunctionDataSource(dataset, splits=tuple(files))


def add_text_task(
    name: str, source: seqio.DataSource, *, text_field: str = "text", vocabulary: seqio.Vocabulary | None = None
) -> seqio.Task:
    """Register a Task whose targets are a text field of the source; "key" and "id" are kept.

    Without a vocabulary the text is passed through, which is enough for `data.mixture`; with one the Task also gives
    ids, ended by the vocabulary's end, to seqio.get_dataset.
    """

    def to_targets(dataset: tf.data.Dataset) -> tf.data.Dataset:
        keys = [key for key in ("key", "id") if key in dataset.element_spec]
        return dataset.map(lambda x: {"targets": x[text_field], **{key: x[key] for key in keys}})

    HAS_JUDGEMENTS[to_targets] = False
    steps = [to_targets]
    if vocabulary is not None:
        steps += [functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False), APPEND_EOS[0]]
    feature = TEXT if vocabulary is None else seqio.Feature(vocabulary)
    return seqio.TaskRegistry.add(name, source, preprocessors=steps, output_features={"targets": feature})


def add_teacher_task(name: str, source: seqio.DataSource, template: str | Template) -> seqio.Task:
    """Register a Task that makes a true and a false proposition of every labelled example (data/freelm.py).

    Elements have "targets", "judgement" and "key", the same for both propositions. `template` may be a name.

    Raises:
        ConfigError: for an unknown name (nearest ones), and while reading for an example without the template's fields.
    """
    if isinstance(template, str):
        if template not in TEMPLATES:
            raise ConfigError(f"task '{name}': there is no template '{template}'{nearest(template, TEMPLATES)}")
        template = TEMPLATES[template]

    def to_propositions(dataset: tf.data.Dataset) -> tf.data.Dataset:
        def elements() -> Iterator[dict[str, Any]]:
            for example in dataset.as_numpy_iterator():
                for document in propositions(tf.nest.map_structure(_python, example), template):
                    yield {"targets": document.text, "judgement": document.judgement, "key": document.key}

        types = {"targets": tf.string, "judgement": tf.bool, "key": tf.string}
        signature = {feature: tf.TensorSpec((), dtype) for feature, dtype in types.items()}
        return tf.data.Dataset.from_generator(elements, output_signature=signature)

    HAS_JUDGEMENTS[to_propositions] = True
    return seqio.TaskRegistry.add(name, source, preprocessors=[to_propositions], output_features={"targets": TEXT})


def _python(value: Any) -> Any:
    """bytes as str, an array as a list."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return [_python(item) for item in value]
    return value.decode("utf-8") if isinstance(value, bytes) else value


# ---- registered Tasks -----------------------------------------------------------------------------------------------

_SPLITS = ("train", "validation")
# Any prepared version 3; never made here: that takes a cluster and 7 TB of crawls for English alone.
_C4 = {
    "c4_en": seqio.TfdsDataSource("c4/en:3.*.*", splits=_SPLITS, read_only=True),
    "c4_zh": seqio.TfdsDataSource(
        "c4/multilingual:3.*.*", splits={"train": "zh", "validation": "zh-validation"}, read_only=True
    ),
}
for _name, _data in _C4.items():
    add_text_task(_name, _data)
for _language in ("en", "zh"):  # all of it is "train"
    _data = seqio.TfdsDataSource(f"wikipedia/20230601.{_language}:1.0.0", splits=("train",))
    add_text_task(f"wikipedia_{_language}", _data)

# FLM-101B's, stated
_SHARES = {"en": 0.535, "zh": 0.465}
for _corpus in ("c4", "wikipedia"):
    seqio.MixtureRegistry.add(
        f"flm_{_corpus}", [(f"{_corpus}_{language}", share) for language, share in _SHARES.items()]
    )

# Template, configuration of super_glue, and its training examples, which are the rates: each is seen equally often
_SUPER_GLUE = {
    "boolq": ("boolq", 9427),
    "cb": ("cb", 250),
    "copa": ("copa", 400),
    "rte": ("rte", 2490),
    "wic": ("wic", 5428),
    "wsc": ("wsc.fixed", 554),
}
for _template, (_config, _) in _SUPER_GLUE.items():
    _data = seqio.TfdsDataSource(f"super_glue/{_config}:1.0.2", splits=_SPLITS)
    add_teacher_task(f"super_glue_{_template}", _data, _template)
seqio.MixtureRegistry.add(
    "super_glue_judgements", [(f"super_glue_{template}", float(n)) for template, (_, n) in _SUPER_GLUE.items()]
)
# Our choice: the paper does not say how much of eFLM-16B's training is teacher signals.
seqio.MixtureRegistry.add("eflm_c4", [("flm_c4", 0.9), ("super_glue_judgements", 0.1)])
