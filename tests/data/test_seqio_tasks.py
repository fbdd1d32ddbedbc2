"""Tasks and Mixtures of seqio as sources of documents."""

import collections
import functools
import math
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("seqio")

import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from flmjax.config import ConfigError, DataConfig
from flmjax.data.prepare import prepare
from flmjax.data.sources import seqio_mixture, seqio_tasks
from flmjax.data.sources.documents import Document
from flmjax.data.sources.freelm import TEMPLATES, Template
from flmjax.data.tokenizers import ByteTokenizer, Cl100kTokenizer, SentencePieceTokenizer

TEXTS = ["One two.", "第二篇 with a\nline break", "  spaces kept  ", "Four, five! 🙂"]
TOKENIZE = functools.partial(seqio.preprocessors.tokenize, copy_pretokenized=False)
BYTES = seqio.Feature(seqio.ByteVocabulary())


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """What a test registers is gone after it."""
    for cls in (seqio.TaskRegistry, seqio.MixtureRegistry):
        monkeypatch.setattr(cls, "_REGISTRY", dict(cls._REGISTRY))


def data_source(**splits) -> seqio.FunctionDataSource:
    """A source of columns by split; a list stands for texts."""
    columns = {split: value if isinstance(value, dict) else {"text": value} for split, value in splits.items()}
    dataset = lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(columns[split])
    return seqio.FunctionDataSource(dataset, splits=tuple(columns))


def targets(dataset):
    return dataset.map(lambda x: {"targets": x["text"]})


def add(name, *steps, source=None, feature=BYTES):
    source = data_source(train=TEXTS) if source is None else source
    return seqio.TaskRegistry.add(name, source, preprocessors=steps, output_features={"targets": feature})


def read(mixture, **settings):
    return seqio_mixture.read_mixture(DataConfig(mixture=mixture, **settings))


def documents(mixture):
    return [list(source.read()) for source in read(mixture).sources]


def refusal(mixture, **settings) -> str:
    with pytest.raises(ConfigError) as error:
        read(mixture, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- names and modules ----------------------------------------------------------------------------------------------


def test_a_module_in_the_current_directory_registers_a_task(tmp_path, monkeypatch):
    """Its text comes out as it went in."""
    (tmp_path / "a.txt").write_text("First\ntext.\n\n\n第二篇\n", encoding="utf-8")
    (tmp_path / "b.md").write_text("# Third\n\n\nstill", encoding="utf-8")
    (tmp_path / "held.txt").write_text("Held out", encoding="utf-8")
    (tmp_path / "tasks_of_a_test.py").write_text(
        "from flmjax.data.sources.seqio_tasks import add_text_task, local_files_source\n"
        "add_text_task('mine', local_files_source({'train': ['a.txt', 'b.md'], 'validation': 'held.txt'}))\n"
    )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    mixture = read("mine", task_module="tasks_of_a_test")
    assert sys.path == path
    assert mixture.rates == (1.0,)
    assert mixture.vocabulary is None
    assert mixture.provenance["seqio"] == seqio.__version__
    assert mixture.provenance["mixture"] == "mine"
    assert [task["task"] for task in mixture.provenance["tasks"]] == ["mine"]
    (source,) = mixture.sources
    assert (source.name, source.is_teacher) == ("mine", False)
    train = ["First\ntext.", "第二篇", "# Third\n\n\nstill"]
    expected = [Document(text, split="train") for text in train] + [Document("Held out", split="validation")]
    assert list(source.read()) == expected
    assert list(source.read()) == expected


@pytest.mark.parametrize("code", [None, "import nothing_of_that_name", "1 / 0"])
def test_a_module_that_cannot_be_imported_is_named_with_the_cause(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"broken_{0 if code is None else len(code)}"
    if code is not None:
        (tmp_path / f"{name}.py").write_text(code)
    cause = {None: f"No module named '{name}'", "1 / 0": "ZeroDivisionError"}.get(code, "nothing_of_that_name")
    message = refusal("c4_en", task_module=name)
    assert message.startswith(f"data.task_module='{name}' cannot be imported: ")
    assert cause in message


def test_an_unknown_mixture_is_refused_with_the_nearest_names():
    message = refusal("flm_c5")
    assert message.startswith("data.mixture: there is no Task or Mixture 'flm_c5'; did you mean ")
    assert "flm_c4" in message


# ---- rates ----------------------------------------------------------------------------------------------------------


def test_a_mixture_in_a_mixture_is_flattened():
    """The Tasks stand in the order of their names."""
    for name in ("b", "a", "c"):
        add(name, targets, feature=seqio_tasks.TEXT)
    seqio.MixtureRegistry.add("inner", [("c", 3), ("a", 1)])
    seqio.MixtureRegistry.add("outer", [("b", 0.5), ("inner", 2)])
    mixture = read("outer")
    assert [source.name for source in mixture.sources] == ["a", "b", "c"]
    assert mixture.rates == (0.5, 0.5, 1.5)  # a: 2 x 1/4, c: 2 x 3/4


@pytest.mark.parametrize("rate", [0, -1.0, math.nan, math.inf])
def test_a_rate_must_be_positive_and_finite(rate):
    add("good", targets)
    add("bad", targets)
    seqio.MixtureRegistry.add("mixed", [("good", 1.0), ("bad", rate)])
    assert refusal("mixed") == f"data.mixture: task 'bad': its rate in 'mixed' is {float(rate)}, but must be positive"


# ---- what is read of a Task -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenize", [seqio.preprocessors.tokenize, TOKENIZE])
@pytest.mark.parametrize("end", [seqio.preprocessors.append_eos, seqio.preprocessors.append_eos_after_trim])
def test_a_task_that_tokenises_gives_its_text_and_no_id(tokenize, end):
    add("ids", targets, seqio.CacheDatasetPlaceholder(), tokenize, end)
    assert documents("ids") == [[Document(text) for text in TEXTS]]


def test_another_step_after_tokenising_is_refused_by_name():
    def reverse_ids(dataset):
        return dataset.map(lambda x: {"targets": x["targets"][::-1]})

    add("reversed", targets, TOKENIZE, reverse_ids)
    message = refusal("reversed")
    assert "task 'reversed': its preprocessor reverse_ids comes after tokenize" in message
    add("partial", targets, TOKENIZE, functools.partial(reverse_ids))
    assert "task 'partial': its preprocessor" in refusal("partial")


def test_a_task_of_ids_without_text_is_refused():
    add("ids", lambda d: d.map(lambda x: {"targets": tf.strings.unicode_decode(x["text"], "UTF-8")}))
    assert "task 'ids': its targets are TensorSpec(shape=(None,), dtype=tf.int32" in refusal("ids")
    add("nothing", lambda d: d.map(lambda x: {"other": x["text"]}))
    assert refusal("nothing") == "data.mixture: task 'nothing': its elements have no feature 'targets'"


def test_inputs_stand_before_targets_and_empty_ones_do_not():
    columns = {"inputs": ["Why?", ""], "targets": ["Because.", "Alone."]}
    add("pairs", TOKENIZE, source=data_source(train=columns))
    assert documents("pairs") == [[Document("Why?\nBecause."), Document("Alone.")]]


def test_an_element_with_a_judgement_is_a_proposition():
    for name, values in {"flags": [True, False], "numbers": [1, 0], "wrong": [1, 2]}.items():
        columns = {"targets": ["2 is even", "3 is even"], "judgement": values}
        add(name, source=data_source(train=columns), feature=seqio_tasks.TEXT)
    for name in ("flags", "numbers"):
        (source,) = read(name).sources
        assert source.is_teacher
        assert list(source.read()) == [Document("2 is even", None, True), Document("3 is even", None, False)]
    with pytest.raises(ConfigError, match="task 'wrong': the judgement of '3 is even' is 2"):
        documents("wrong")


def test_without_a_validation_split_the_key_decides():
    columns = {"text": TEXTS, "id": ["p", "q", "p", ""]}
    seqio_tasks.add_text_task("keyed", data_source(train=columns))
    (keyed,) = documents("keyed")
    assert keyed == [Document(text, key) for text, key in zip(TEXTS, ("p", "q", "p", None), strict=True)]
    seqio_tasks.add_text_task("numbered", data_source(train={"text": TEXTS, "id": [1, 2, 3, 4]}))
    assert documents("numbered") == [[Document(text) for text in TEXTS]]


def test_a_task_without_training_examples_is_refused():
    add("empty", targets, source=data_source(train=np.array([], object).astype(str), validation=TEXTS))
    assert refusal("empty") == "data.mixture: task 'empty': its split 'train' is empty; its splits: train, validation"
    add("tested", targets, source=data_source(test=TEXTS, validation=TEXTS))
    assert refusal("tested") == "data.mixture: task 'tested': it has no split 'train'; its splits: test, validation"


def test_random_steps_give_the_same_documents_every_time():
    @seqio.map_over_dataset(num_seeds=1)
    def drawn(x, seed):
        return {"targets": x["text"] + tf.strings.as_string(tf.random.stateless_uniform((), seed))}

    def undrawn(dataset):
        return dataset.map(lambda x: {"targets": x["targets"] + tf.strings.as_string(tf.random.uniform(()))})

    def shuffled(dataset):
        return dataset.shuffle(100)

    many = data_source(train=[str(i) + " " for i in range(50)])
    add("random", drawn, undrawn, shuffled, source=many)
    (source,) = read("random").sources
    first = list(source.read())
    assert first == list(source.read())
    assert first == documents("random")[0]
    assert [int(document.text.split()[0]) for document in first] != list(range(50))


def test_an_error_in_a_task_is_told_in_one_line_that_names_it(tmp_path):
    seqio_tasks.add_text_task("lacking", data_source(train={"body": TEXTS}))
    assert refusal("lacking") == "data.mixture: task 'lacking': KeyError: 'text'"
    (tmp_path / "a.txt").write_bytes(b"good\n\n\n" * 10_000 + b"bad \xff")
    seqio_tasks.add_text_task("broken", seqio_tasks.local_files_source({"train": str(tmp_path)}))
    with pytest.raises(ConfigError, match=r"^task 'broken': .*a\.txt.*UTF-8") as error:
        documents("broken")
    assert "\n" not in str(error.value)
    seqio_tasks.add_text_task("absent", seqio_tasks.local_files_source({"train": "/nowhere/*.txt"}))
    assert refusal("absent") == "data.mixture: task 'absent': split 'train': no file matches '/nowhere/*.txt'"


# ---- vocabularies ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "spm.model"
    SentencePieceTokenizer.train(["some words and some other words\n"] * 50, 280).save(path.parent)
    (path.parent / "tokenizer.model").rename(path)
    return path


def test_a_task_that_tokenises_gives_its_vocabulary(model):
    pytest.importorskip("bpe_openai")
    vocabularies = {
        "pieces": (seqio.SentencePieceVocabulary(str(model)), SentencePieceTokenizer(model.read_bytes())),
        "bytes": (seqio.ByteVocabulary(extra_ids=7), ByteTokenizer(3, 1, 266)),
        "openai": (seqio_tasks.Cl100kVocabulary(1432), Cl100kTokenizer(1432)),
    }
    for name, (vocabulary, expected) in vocabularies.items():
        seqio_tasks.add_text_task(name, data_source(train=TEXTS), vocabulary=vocabulary)
        tokenizer = read(name).vocabulary
        assert (type(tokenizer), tokenizer.fingerprint) == (type(expected), expected.fingerprint)
        assert (tokenizer.end_id, tokenizer.vocab_size) == (vocabulary.eos_id, vocabulary.vocab_size)
        assert tokenizer.encode(TEXTS[0]).tolist() == vocabulary.encode(TEXTS[0])
        assert read(name, vocabulary="bytes").vocabulary is None


def test_sentinels_of_a_sentencepiece_vocabulary_are_in_it(model):
    vocabulary = seqio.SentencePieceVocabulary(str(model), extra_ids=3)
    seqio_tasks.add_text_task("pieces", data_source(train=TEXTS), vocabulary=vocabulary)
    assert read("pieces").vocabulary.vocab_size == 283


def test_different_vocabularies_in_one_mixture_are_refused(model):
    feature = seqio.Feature(seqio.SentencePieceVocabulary(str(model)))
    add("a_text", targets, feature=seqio_tasks.TEXT)
    add("b_bytes", targets, TOKENIZE)
    add("c_pieces", targets, TOKENIZE, feature=feature)
    seqio.MixtureRegistry.add("mixed", ["a_text", "b_bytes", "c_pieces"], default_rate=1)
    message = refusal("mixed")
    assert "task 'c_pieces': its vocabulary is not that of task 'b_bytes'" in message
    assert read("mixed", vocabulary="bytes").vocabulary is None
    seqio.MixtureRegistry.add("passed", ["a_text", "b_bytes"], default_rate=1)
    assert isinstance(read("passed").vocabulary, ByteTokenizer)


def test_a_vocabulary_of_another_kind_is_refused_by_name():
    add("words", targets, TOKENIZE, feature=seqio.Feature(seqio.UnigramVocabulary(["a", "b"])))
    message = refusal("words")
    assert "task 'words': its vocabulary is a UnigramVocabulary" in message
    assert "SentencePieceVocabulary, ByteVocabulary" in message


def test_cl100k_through_seqio_alone_gives_the_ids_of_the_tokenizer():
    pytest.importorskip("bpe_openai")
    vocabulary, tokenizer = seqio_tasks.Cl100kVocabulary(), Cl100kTokenizer()
    assert vocabulary == seqio_tasks.Cl100kVocabulary()
    assert vocabulary != seqio_tasks.Cl100kVocabulary(1432)
    assert vocabulary.vocab_size == tokenizer.vocab_size
    texts = [text.replace("!", "?") for text in TEXTS]  # "!" is 0, which seqio pads with
    seqio_tasks.add_text_task("openai", data_source(train={"text": texts, "key": texts}), vocabulary=vocabulary)
    expected = [i for text in texts for i in (*tokenizer.encode(text), tokenizer.end_id)]
    for pack in (False, True):
        converter = seqio.LMFeatureConverter(pack=pack)
        dataset = seqio.get_dataset("openai", {"targets": 64}, converter, shuffle=False, verbose=False)
        rows = [row["decoder_target_tokens"] for row in dataset.as_numpy_iterator()]
        assert [i for row in rows for i in row if i != 0] == expected
        assert len(rows) == (1 if pack else len(TEXTS))
    ids = tokenizer.encode(TEXTS[3])
    assert vocabulary.decode([*ids, tokenizer.end_id, 5]) == TEXTS[3]
    padded = tf.constant([*ids, tokenizer.end_id, 5, 5], tf.int32)
    assert vocabulary.decode_tf(padded).numpy().decode() == TEXTS[3]


# ---- teachers -------------------------------------------------------------------------------------------------------


def test_an_example_becomes_two_propositions_with_one_key():
    columns = {"question": ["is it"] * 9, "passage": [f"p{i}" for i in range(9)], "label": [0, 1, -1] * 3}
    seqio_tasks.add_teacher_task("judged", data_source(train=columns, validation=columns), "boolq")
    (source,) = read("judged").sources
    assert source.is_teacher
    propositions = list(source.read())
    assert propositions == list(source.read())
    assert collections.Counter((d.split, d.judgement) for d in propositions) == {
        (split, judgement): 6 for split in ("train", "validation") for judgement in (True, False)
    }
    assert all(
        true.key == false.key and true.key is not None
        for true, false in zip(propositions[::2], propositions[1::2], strict=True)
    )
    assert propositions[:2] == [
        Document("p0\nQuestion: is it?\nAnswer: no\nJudgement:", propositions[0].key, True, "train"),
        Document("p0\nQuestion: is it?\nAnswer: yes\nJudgement:", propositions[0].key, False, "train"),
    ]


def test_a_new_template_reads_lists_and_nested_fields():
    template = Template("{words} {deep} {label}", {"0": "odd", "1": "even"})
    columns = {"words": [["a", "中"]], "in": {"deep": [2]}, "label": [1]}
    seqio_tasks.add_teacher_task("mine", data_source(train=columns), template)
    assert [document.text for document in documents("mine")[0]] == ["a、中 2 even", "a、中 2 odd"]


def test_unknown_templates_and_missing_fields_are_refused():
    with pytest.raises(ConfigError, match="task 'x': there is no template 'boolk'; did you mean boolq"):
        seqio_tasks.add_teacher_task("x", data_source(train=TEXTS), "boolk")
    seqio_tasks.add_teacher_task("lacking", data_source(train={"passage": TEXTS, "label": [0, 1, 0, 1]}), "boolq")
    assert refusal("lacking").startswith("data.mixture: task 'lacking': example 0: an example has no field 'question'")


def test_a_task_of_examples_without_a_usable_label_is_refused():
    columns = {"passage": TEXTS, "question": TEXTS, "label": [-1] * len(TEXTS)}
    seqio_tasks.add_teacher_task("hidden", data_source(train=columns), "boolq")
    assert f"task 'hidden': {len(TEXTS)} of {len(TEXTS)} examples have no usable label" in refusal("hidden")


# ---- registered Tasks -----------------------------------------------------------------------------------------------


def test_the_paper_mixtures_of_c4_and_wikipedia_have_its_shares():
    with tfds.testing.mock_data(num_examples=3):
        c4, wikipedia = read("flm_c4"), read("flm_wikipedia")
        c4_documents = [list(source.read()) for source in c4.sources]
        wikipedia_documents = [list(source.read()) for source in wikipedia.sources]
    assert dict(zip((s.name for s in c4.sources), c4.rates, strict=True)) == {"c4_en": 0.535, "c4_zh": 0.465}
    assert dict(zip((s.name for s in wikipedia.sources), wikipedia.rates, strict=True)) == {
        "wikipedia_en": 0.535,
        "wikipedia_zh": 0.465,
    }
    assert c4.vocabulary is None
    for texts in c4_documents:
        assert [document.split for document in texts] == ["train"] * 3 + ["validation"] * 3
    for texts in wikipedia_documents:
        assert [document.split for document in texts] == [None] * 3


def test_nine_tenths_of_eflm_are_text():
    """The examples of all teachers are seen equally often."""
    with tfds.testing.mock_data(num_examples=5):
        mixture = read("eflm_c4")
        documents_of = {source.name: list(source.read()) for source in mixture.sources}
    rates = dict(zip(documents_of, mixture.rates, strict=True))
    assert sum(rates.values()) == pytest.approx(1)
    assert rates["c4_en"] == pytest.approx(0.9 * 0.535)
    assert rates["c4_zh"] == pytest.approx(0.9 * 0.465)
    assert rates["super_glue_boolq"] / rates["super_glue_rte"] == pytest.approx(9427 / 2490)
    teachers = {source.name for source in mixture.sources if source.is_teacher}
    assert teachers == {f"super_glue_{name}" for name in ("boolq", "cb", "copa", "rte", "wic", "wsc")}
    for name in teachers:
        assert collections.Counter((d.split, d.judgement) for d in documents_of[name]) == {
            (split, judgement): 5 for split in ("train", "validation") for judgement in (True, False)
        }


@pytest.mark.parametrize(("template", "config"), [(t, c) for t, (c, _) in seqio_tasks.SUPER_GLUE.items()])
def test_templates_spell_the_numbered_labels_of_tfds(template, config):
    features = tfds.builder(f"super_glue/{config}").info.features
    labels = TEMPLATES[template].labels
    spelled = {"False": "no", "True": "yes", "choice1": "{choice1}", "choice2": "{choice2}"}
    spelled["not_entailment"] = "not entailment"
    for number, name in enumerate(features["label"].names):
        assert labels[str(number)] == spelled.get(name, name)
    assert str(features["label"].num_classes) not in labels


# ---- preparation ----------------------------------------------------------------------------------------------------


def test_a_mixture_is_prepared_in_its_vocabulary_and_its_splits(tmp_path):
    text = {"train": {"text": TEXTS}, "validation": {"text": ["Held out"]}}
    seqio_tasks.add_text_task("text", data_source(**text))
    seqio_tasks.add_text_task("more", data_source(**text), vocabulary=seqio.ByteVocabulary())
    columns = {"question": ["q"] * 4, "passage": ["a", "b", "c", "d"], "label": [0, 1, 0, 1]}
    seqio_tasks.add_teacher_task("judged", data_source(train=columns, validation=columns), "boolq")
    seqio.MixtureRegistry.add("all", [("text", 0.5), ("more", 0.25), ("judged", 0.25)])
    prepared = prepare(DataConfig(mixture="all"), tmp_path / "data")
    assert prepared.sources == ("judged", "more", "text")
    assert prepared.rates == (0.25, 0.25, 0.5)
    assert prepared.is_teacher("judged")
    assert prepared.meta["mixture"] == "all"
    assert prepared.tokenizer.fingerprint == ByteTokenizer(3, 1, 259).fingerprint
    for split, expected in {"train": TEXTS, "validation": ["Held out"]}.items():
        ids = [i for text in expected for i in (*prepared.tokenizer.encode(text), 1)]
        assert prepared.tokens("text", split).tolist() == ids
        assert prepared.tokens("more", split).tolist() == ids


def test_a_wrong_number_of_weights_is_refused_before_reading(tmp_path, monkeypatch):
    for name in ("one", "two"):
        seqio_tasks.add_text_task(name, data_source(train=TEXTS))
    seqio.MixtureRegistry.add("both", [("one", 0.5), ("two", 0.5)])
    monkeypatch.setattr("flmjax.data.spool.Spool.fill", None)  # would be called to read
    with pytest.raises(
        ConfigError, match=r"data\.mixture_weights has 3 entries for the 2 tasks of .*'both': one, two; None "
    ):
        prepare(DataConfig(mixture="both", mixture_weights=(0.5, 0.25, 0.25)), tmp_path / "data")


def test_tensorflow_takes_no_gpu_and_writes_no_warning():
    code = (
        "from flmjax.data.sources.seqio_tasks import tf; "
        "print(tf.config.get_visible_devices('GPU'), 'GPU' in tf.zeros(1).device)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert (done.stdout, done.stderr) == ("[] False\n", "")
