"""seqio Tasks: helpers to register them, a vocabulary for cl100k, and the Tasks and Mixtures of the papers.

A registered Task serves two readers: `data.mixture` of flmjax (seqio_mixture.py), and seqio alone.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from flmjax.config import ConfigError, nearest
from flmjax.data.sources import text_source
from flmjax.data.sources.documents import as_document, key_bytes
from flmjax.data.sources.files import report_left_out
from flmjax.data.sources.freelm import TEMPLATES, Template, judged_examples
from flmjax.data.tokenizers import Cl100kTokenizer
from flmjax.stderr import captured_stderr

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
try:
    with captured_stderr():  # TensorFlow reports missing GPUs before any log level holds
        import seqio
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # raised if TensorFlow is in use already: its devices are fixed then
            tf.config.set_visible_devices([], "GPU")  # GPU memory belongs to JAX
except ImportError as missing:
    raise ConfigError(f"data.mixture needs packages ({missing}); pip install 'flmjax[data]'") from missing

__all__ = [
    "HAS_JUDGEMENTS",
    "SUPER_GLUE",
    "TEXT",
    "Cl100kVocabulary",
    "add_teacher_task",
    "add_text_task",
    "local_files_source",
    "seqio",
    "tf",
]

# Whether elements have judgements, by the preprocessor that makes them: known without the data set.
HAS_JUDGEMENTS: dict[Callable[..., Any], bool] = {}
TEXT = seqio.Feature(seqio.PassThroughVocabulary(size=0), add_eos=False, dtype=tf.string, rank=0)


def local_files_source(files: Mapping[str, str | Sequence[str]], split_by: str = "text") -> seqio.FunctionDataSource:
    """A seqio data source of text files.

    Elements have the features "text" and "key" (empty for a document without a key). Paths are relative to the current
    directory and are looked up when the source is read.

    Args:
        files: for each split one entry or several entries as in `data.sources`: a file, a folder, a glob, a name.
        split_by: as in the settings.
    """

    said: set[str] = set()  # entries whose files were reported; a split is read several times

    def elements(split: str) -> Iterator[dict[str, str | bytes]]:
        entries = files[split]
        for entry in (entries,) if isinstance(entries, str) else entries:
            source = text_source(entry, split_by, f"split '{split}'")
            if entry not in said:
                said.add(entry)
                report_left_out(f"split '{split}'", source.name, source.files)
            for document in map(as_document, source.read()):
                yield {"text": document.text, "key": key_bytes(document.key or "")}

    def dataset(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
        signature = {name: tf.TensorSpec((), tf.string) for name in ("text", "key")}
        return tf.data.Dataset.from_generator(functools.partial(elements, split), output_signature=signature)

    return seqio.FunctionDataSource(dataset, splits=tuple(files))


def add_text_task(
    name: str, source: seqio.DataSource, *, text_field: str = "text", vocabulary: seqio.Vocabulary | None = None
) -> seqio.Task:
    """Register a Task whose targets are a text field of the source; its features "key" and "id" are kept.

    Without a vocabulary the Task passes the text through, which is enough for `data.mixture`. With a vocabulary it also
    gives token ids, each document ended by the end token, to seqio.get_dataset.
    """

    def to_targets(dataset: tf.data.Dataset) -> tf.data.Dataset:
        keys = [key for key in ("key", "id") if key in dataset.element_spec]
        return dataset.map(lambda x: {"targets": x[text_field], **{key: x[key] for key in keys}})

    HAS_JUDGEMENTS[to_targets] = False
    steps = [to_targets]
    if vocabulary is not None:
        tokenize = functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False)
        steps += [tokenize, seqio.preprocessors.append_eos]
    feature = TEXT if vocabulary is None else seqio.Feature(vocabulary)
    return seqio.TaskRegistry.add(name, source, preprocessors=steps, output_features={"targets": feature})


def add_teacher_task(name: str, source: seqio.DataSource, template: str | Template) -> seqio.Task:
    """Register a Task that turns every labelled example into a true and a false proposition (freelm.py).

    Elements have "targets", "judgement" and "key"; both propositions of an example have the same key.

    Args:
        template: a Template, or the name of one in freelm.TEMPLATES.

    Raises:
        ConfigError: for an unknown name (with the nearest ones); while reading, for an example that lacks a field of
            the template.
    """
    if isinstance(template, str):
        if template not in TEMPLATES:
            raise ConfigError(f"task '{name}': there is no template '{template}'{nearest(template, TEMPLATES)}")
        template = TEMPLATES[template]

    def to_propositions(dataset: tf.data.Dataset) -> tf.data.Dataset:
        def elements() -> Iterator[dict[str, Any]]:
            for document in judged_examples(_examples(dataset), template, f"task '{name}'"):
                if document.text:
                    yield {"targets": document.text, "judgement": document.judgement, "key": document.key}

        dtypes = {"targets": tf.string, "judgement": tf.bool, "key": tf.string}
        signature = {feature: tf.TensorSpec((), dtype) for feature, dtype in dtypes.items()}
        return tf.data.Dataset.from_generator(elements, output_signature=signature)

    HAS_JUDGEMENTS[to_propositions] = True
    return seqio.TaskRegistry.add(name, source, preprocessors=[to_propositions], output_features={"targets": TEXT})


def _examples(dataset: tf.data.Dataset) -> Iterator[tuple[str, dict[str, Any]]]:
    for i, example in enumerate(dataset.as_numpy_iterator()):
        fields = tf.nest.map_structure(_to_python, example)
        if fields.get("key") == "":  # a feature cannot be missing
            del fields["key"]
        yield f"example {i}", fields


def _to_python(value: Any) -> Any:
    """A NumPy value as Python's: bytes become str, arrays become lists."""
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return [_to_python(item) for item in value]
    return value.decode("utf-8") if isinstance(value, bytes) else value


class Cl100kVocabulary(seqio.Vocabulary):
    """OpenAI's cl100k for Tasks that run through seqio alone; its ids are those of Cl100kTokenizer.

    seqio's feature converters treat id 0 as padding wherever it occurs, and in cl100k id 0 is "!". It therefore gets no
    loss, and packing removes one token from the end of a document for each "!" in it. Data that flmjax prepares has no
    such padding.
    """

    def __init__(self, end_id: int = 100257):
        super().__init__(extra_ids=0)
        self.tokenizer = Cl100kTokenizer(end_id)

    @property
    def bos_id(self) -> None:
        """None: cl100k has no id for the beginning of a document."""

    @property
    def eos_id(self) -> int:
        """The id that ends a document."""
        return self.tokenizer.end_id

    @property
    def pad_id(self) -> int:
        """The id of the end token, which decodes to nothing."""
        return self.tokenizer.end_id

    @property
    def unk_id(self) -> int:
        """The id of the end token; every text can be encoded, so no text needs an unknown token."""
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


# ---- Tasks and Mixtures of the papers --------------------------------------------------------------------------------

_SPLITS = ("train", "validation")
# Any prepared version 3. read_only: preparing C4 takes a cluster, and 7 TB of crawls for English alone.
_C4 = {
    "c4_en": seqio.TfdsDataSource("c4/en:3.*.*", splits=_SPLITS, read_only=True),
    "c4_zh": seqio.TfdsDataSource(
        "c4/multilingual:3.*.*", splits={"train": "zh", "validation": "zh-validation"}, read_only=True
    ),
}
for _name, _data in _C4.items():
    add_text_task(_name, _data)
for _language in ("en", "zh"):  # Wikipedia in TFDS has the split "train" alone
    _data = seqio.TfdsDataSource(f"wikipedia/20230601.{_language}:1.0.0", splits=("train",))
    add_text_task(f"wikipedia_{_language}", _data)

_SHARES = {"en": 0.535, "zh": 0.465}  # stated by FLM-101B
for _corpus in ("c4", "wikipedia"):
    seqio.MixtureRegistry.add(
        f"flm_{_corpus}", [(f"{_corpus}_{language}", share) for language, share in _SHARES.items()]
    )

# Template: (configuration of super_glue in TFDS, number of training examples). The numbers are the rates of the Tasks,
# so that every example of every Task is seen equally often.
SUPER_GLUE = {
    "boolq": ("boolq", 9427),
    "cb": ("cb", 250),
    "copa": ("copa", 400),
    "rte": ("rte", 2490),
    "wic": ("wic", 5428),
    "wsc": ("wsc.fixed", 554),
}
for _template, (_config, _) in SUPER_GLUE.items():
    _data = seqio.TfdsDataSource(f"super_glue/{_config}:1.0.2", splits=_SPLITS)
    add_teacher_task(f"super_glue_{_template}", _data, _template)
seqio.MixtureRegistry.add(
    "super_glue_judgements", [(f"super_glue_{template}", float(n)) for template, (_, n) in SUPER_GLUE.items()]
)
# Our choice: the paper does not say how much of the training of eFLM-16B is teacher signals.
seqio.MixtureRegistry.add("eflm_c4", [("flm_c4", 0.9), ("super_glue_judgements", 0.1)])
