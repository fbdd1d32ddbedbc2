"""Teacher signals: propositions, marks, rows of propositions, and their place in the stream."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flmjax.config import ConfigError, DataConfig
from flmjax.data.inspection import summary
from flmjax.data.loader import TrainingStream
from flmjax.data.mixture import MixturePhase
from flmjax.data.packing import first_propositions, make_proposition_row
from flmjax.data.prepare import prepare
from flmjax.data.sources import hsk
from flmjax.data.sources.documents import Document, is_held_out
from flmjax.data.sources.freelm import (
    PAIRS,
    TEMPLATES,
    Marks,
    Template,
    judged_pairs,
    marks,
    propositions,
    teacher_source,
)
from flmjax.data.tokenizers import ByteTokenizer, Cl100kTokenizer, SentencePieceTokenizer

DATA = DataConfig(sources=("text",), teachers=("teacher",), vocabulary="bytes", validation_fraction=0.2)
TRUE, FALSE = "😈".encode(), "😡".encode()


# ---- marks ----------------------------------------------------------------------------------------------------------


def test_the_papers_marks_differ_in_their_last_token():
    """That is the second token in cl100k, and the last byte of four."""
    assert marks(Cl100kTokenizer(), DATA) == Marks((76460, 230), (76460, 94), 1)
    assert marks(ByteTokenizer(), DATA) == Marks(tuple(TRUE), tuple(FALSE), 3)


def test_which_mark_is_true_is_a_setting():
    swapped = DataConfig(true_mark="😡", false_mark="😈")
    assert marks(ByteTokenizer(), swapped) == Marks(tuple(FALSE), tuple(TRUE), 3)


def test_marks_of_several_different_tokens_are_decided_at_the_first():
    assert marks(ByteTokenizer(), DataConfig(true_mark="ayes", false_mark="anot")).differs == 1


@pytest.mark.parametrize(
    ("true", "false", "message"),
    [("yes", "no", r"'yes' has 3 tokens .* 'no' has 2|'yes' has 3 tokens .*'no' has 2"), ("x", "x", "equal ids")],
)
def test_marks_of_unequal_length_or_equal_ids_are_refused(true, false, message):
    with pytest.raises(ConfigError, match=message):
        marks(ByteTokenizer(), DataConfig(true_mark=true, false_mark=false))


def test_a_mark_that_the_vocabulary_cannot_spell_is_refused():
    class Ascii(ByteTokenizer):
        def encode(self, text):
            return super().encode(text.encode("ascii", "replace").decode())

    with pytest.raises(ConfigError, match=r"data\.true_mark='😈' has no spelling in the vocabulary"):
        marks(Ascii(), DATA)


def test_marks_of_a_trained_vocabulary_have_one_length():
    pieces = SentencePieceTokenizer.train(["some words of text", "and some more words of it"] * 50, 290)
    ids = marks(pieces, DATA)
    assert len(ids.true) == len(ids.false)
    assert ids.true[: ids.differs] == ids.false[: ids.differs]


# ---- propositions ---------------------------------------------------------------------------------------------------

EXAMPLES = {
    "boolq": {"passage": "P.", "question": "is it so", "label": 1},
    "rte": {"premise": "A", "hypothesis": "B", "label": 0},
    "cb": {"premise": "A", "hypothesis": "B", "label": 2},
    "wic": {"word": "w", "sentence1": "a w", "sentence2": "w b", "label": 0},
    "wsc": {"text": "t", "span1_text": "Mark", "span2_text": "he", "label": True},
    "copa": {"premise": "It rained.", "question": "effect", "choice1": "wet", "choice2": "dry", "label": 0},
    "afqmc": {"sentence1": "一", "sentence2": "二", "label": "1"},
    "ocnli": {"sentence1": "一", "sentence2": "二", "label": "neutral"},
    "csl": {"abst": "摘", "keyword": ["甲", "乙"], "label": "0"},
    "cluewsc": {"text": "文", "target": {"span1_text": "甲", "span2_text": "他"}, "label": "true"},
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_makes_a_true_and_a_false_proposition(name):
    true, false = propositions(EXAMPLES[name], TEMPLATES[name])
    assert (true.judgement, false.judgement) == (True, False)
    assert true.text != false.text
    assert true.key == false.key
    assert "{" not in true.text + false.text


def test_labels_become_words_and_fields_are_filled_in():
    true, false = propositions(EXAMPLES["copa"], TEMPLATES["copa"])
    assert true.text == "It rained.\nThe effect: wet\nJudgement:"
    assert false.text == "It rained.\nThe effect: dry\nJudgement:"
    true, _ = propositions(EXAMPLES["csl"], TEMPLATES["csl"])
    assert true.text == "摘要：摘\n关键词：甲、乙\n关键词不符合摘要\n判断："


def test_the_false_proposition_has_a_wrong_label():
    """It is the same label each time."""
    for i in range(20):
        example = {"sentence1": f"一{i}", "sentence2": "二", "label": "neutral"}
        first = list(propositions(example, TEMPLATES["ocnli"]))
        assert first == list(propositions(example, TEMPLATES["ocnli"]))
        assert "中立" not in first[1].text


def test_hidden_labels_make_nothing_and_missing_fields_are_named():
    assert list(propositions({"premise": "A", "hypothesis": "B", "label": -1}, TEMPLATES["rte"])) == []
    with pytest.raises(ConfigError, match=r"no field 'hypothesis'; it has: label, premise"):
        list(propositions({"premise": "A", "label": 0}, TEMPLATES["rte"]))
    with pytest.raises(ConfigError, match="no field 'label'"):
        list(propositions({"premise": "A"}, TEMPLATES["rte"]))


@pytest.mark.parametrize("label", [1, 1.0, "1", "1.0", True, "true", " True\n", "yes", "YES "])
def test_unambiguous_spellings_of_a_label_are_one_label(label):
    expected = list(propositions(EXAMPLES["boolq"], TEMPLATES["boolq"]))
    assert list(propositions({**EXAMPLES["boolq"], "label": label}, TEMPLATES["boolq"])) == expected


def write_boolq(path, *labels):
    """Files of 40 examples, with the labels by turns."""
    examples = ({**EXAMPLES["boolq"], "passage": f"P {i}.", "label": labels[i % len(labels)]} for i in range(40))
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return DataConfig(**{**vars(DATA), "sources": ("hsk",), "teachers": (f"boolq:{path}",)})


def test_examples_without_a_usable_label_are_counted(tmp_path, capsys):
    data = write_boolq(tmp_path / "b.jsonl", 1, 0, "maybe", None, -1, 10, 1.5, "no")
    prepared = prepare(data, tmp_path / "data")
    first = f"{tmp_path}/b.jsonl: line 3: label='maybe'"
    line = (
        f"flmjax: 'boolq:{tmp_path}/b.jsonl': 25 of 40 examples have no usable label and are left out (first: {first}; "
    )
    assert capsys.readouterr().err.startswith(line + "labels: 0, 1, false, true)")
    counts = prepared.meta["sources"][data.teachers[0]]
    assert sum(counts[split]["documents"] for split in ("train", "validation")) == 2 * 15
    stream = TrainingStream(prepared, data, 0, 32, (MixturePhase((0.5, 0.5), None),))
    assert f"{data.teachers[0]}: 25 documents without text or usable label are left out" in summary(stream)


def test_examples_without_any_usable_label_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.teachers: 40 of 40 examples have no usable label.*b\.jsonl: line 1"):
        prepare(write_boolq(tmp_path / "b.jsonl", 2, "maybe"), tmp_path / "data")


def test_false_pairs_have_a_second_text_of_the_same_split():
    """There are as many false pairs as true ones."""
    pairs = [(f"k{i}", f"first {i}", f"second {i}") for i in range(400)]
    side = {f"second {i}": is_held_out(f"k{i}".encode(), 0.3) for i in range(400)}
    documents = list(judged_pairs(pairs, "{first}|{second}", 0.3))
    true = [d for d in documents if d.judgement]
    false = [d for d in documents if not d.judgement]
    assert [d.text for d in true] == [f"{a}|{b}" for _, a, b in pairs]
    assert len(false) == 398  # the first of each side has nobody before it
    for document in false:
        first, second = document.text.split("|")
        assert second.removeprefix("second ") != first.removeprefix("first ")
        assert side[second] == is_held_out(document.key.encode(), 0.3)
    assert documents == list(judged_pairs(iter(pairs), "{first}|{second}", 0.3))


def test_no_false_proposition_is_true():
    """The second text of a pair may be drawn for another pair with the same second text."""
    pairs = [(f"k{i}", f"first {i}", f"second {i % 2}") for i in range(60)]
    false = [d.text for d in judged_pairs(pairs, "{first}|{second}", 0.3) if not d.judgement]
    assert 10 < len(false) < 50
    assert all(int(text.split("|")[0][6:]) % 2 != int(text[-1]) for text in false)


def test_held_out_pairs_are_in_no_training_text():
    held_out = [pair for pair in hsk.translations() if is_held_out(pair[0].encode(), 0.1)]
    training = "\n".join(d.text for d in hsk.documents() if not is_held_out(d.key.encode(), 0.1))
    assert len(held_out) > 300
    seen = [f"{first}\n{second}" in training for _, first, second in held_out]
    assert sum(seen) < 0.02 * len(seen)  # sentences that the corpus has twice, under two topics


def test_every_kind_of_teacher_is_read(tmp_path):
    (tmp_path / "rte.jsonl").write_text(json.dumps(EXAMPLES["rte"]) + "\n\n" + json.dumps(EXAMPLES["rte"]))
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps({"en": f"e{i}", "zh": f"中{i}"}) for i in range(9)))
    (tmp_path / "judged.jsonl").write_text(json.dumps({"proposition": "1 + 1 = 2\nTrue?", "judgement": True}))
    long = "word " * 30
    (tmp_path / "text.txt").write_text("\n\n\n".join(f"{long}{i}\n\n{i} {long}" for i in range(9)))
    data = DataConfig()

    def read(name):
        return list(teacher_source(name.replace("DIR", str(tmp_path)), data).read())

    assert [d.judgement for d in read("rte:DIR/rte.jsonl")] == [True, False] * 2
    assert read("translation:DIR/pairs.jsonl")[0].text == PAIRS["translation"].format(first="e0", second="中0")
    assert [d.text for d in read("DIR/judged.jsonl")] == ["1 + 1 = 2\nTrue?"]
    assert sum(d.judgement for d in read("topic:DIR/text.txt")) == 9
    assert len(read("hsk_translations")) > 8000


@pytest.mark.parametrize("line_end", ["\n", "\r\n", " \n", "\t\r\n"])
@pytest.mark.parametrize("suffix", ["txt", "md", "jsonl"])
def test_paragraphs_end_at_blank_lines_of_any_line_end(tmp_path, line_end, suffix):
    text = ("word " * 30 + f"\nNUMBER first\n\nNUMBER second {'word ' * 30}\n").replace("\n", line_end)
    for i in range(9):
        content = text.replace("NUMBER", str(i))
        content = json.dumps({"text": content}) if suffix == "jsonl" else content
        (tmp_path / f"{i}.{suffix}").write_text(content, newline="")
    pairs = [d.text for d in teacher_source(f"topic:{tmp_path}", DataConfig()).read() if d.judgement]
    assert len(pairs) == 9
    assert all(f"{i} first" in pair and f"{i} second" in pair for i, pair in enumerate(pairs))


def test_documents_of_one_paragraph_are_no_topics(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n\n".join("word " * 30 + f"\nline {i}" for i in range(20)))
    message = r"data\.teachers: none of the 20 documents of '.*' has two paragraphs of 60 characters.* blank line"
    data = DataConfig(sources=(str(tmp_path),), teachers=(f"topic:{tmp_path}",), vocabulary="bytes")
    with pytest.raises(ConfigError, match=message):
        prepare(data, tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rtee:x.jsonl", r"no template 'rtee'; did you mean rte"),
        ("rte:none.jsonl", r"data\.teachers: no file or folder 'none\.jsonl'"),
        ("none.jsonl", r"data\.teachers: no file or folder"),
        ("boolq:nofile", r"data\.teachers: no file or folder 'nofile' \(tried /.*/nofile\)$"),
        ("translation:hsk", r"data\.teachers: no file or folder 'hsk' \(tried /.*/hsk\)$"),
        ("hsk_level", r"data\.teachers: 'hsk_level' is neither .*did you mean hsk_levels"),
        ("topic:hskk", r"data\.teachers: 'hskk' is neither .*did you mean hsk"),
    ],
)
def test_unknown_teachers_are_named_at_once(name, message):
    with pytest.raises(ConfigError, match=message):
        teacher_source(name, DataConfig())


@pytest.mark.parametrize(
    ("kind", "line", "message"),
    [
        ("", "{", r"t\.jsonl: line 2 is not JSON"),
        ("", "[1]", r"t\.jsonl: line 2 is no JSON object"),
        ("", '{"proposition": "x", "judgement": 1}', r'line 2: a teacher\'s line needs "proposition"'),
        ("translation:", '{"a": "x"}', "line 2: a pair needs two texts, not 1"),
        ("rte:", '{"premise": "x", "label": 0}', "line 2: an example has no field 'hypothesis'"),
    ],
)
def test_a_line_that_does_not_fit_is_named(tmp_path, kind, line, message):
    (tmp_path / "t.jsonl").write_text("\n" + line)
    with pytest.raises(ConfigError, match=message):
        list(teacher_source(f"{kind}{tmp_path}/t.jsonl", DataConfig()).read())


# ---- rows -----------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(2, 40), max_size=30), length=st.integers(4, 30))
@settings(deadline=None)
def test_every_proposition_is_whole_in_one_row_or_cut_at_its_front(lengths, length):
    offsets = np.cumsum([0, *lengths]).astype(np.uint64)
    tokens = np.arange(offsets[-1], dtype=np.uint32) + 1000
    weights = np.zeros(len(tokens), np.uint8)
    weights[offsets[1:].astype(int) - 1] = 2
    firsts = first_propositions(offsets, length)
    assert firsts[0] == 0
    assert firsts[-1] == len(lengths)
    documents = []
    for first, last in itertools.pairwise(firsts):
        row = make_proposition_row(tokens, offsets, weights, range(first, last), length, end_id=0, mark_weight=0.5)
        assert row["decisive"].sum() == last - first
        np.testing.assert_array_equal(row["weights"], 0.5 * row["decisive"])
        for segment in range(1, last - first + 1):
            places = row["segment_ids"] == segment
            document = [row["tokens"][places][0], *row["targets"][places]]
            np.testing.assert_array_equal(row["targets"][places][:-1], row["tokens"][places][1:])
            np.testing.assert_array_equal(row["positions"][places], np.arange(places.sum()))
            documents.append(document)
        padding = row["segment_ids"] == 0
        assert row["weights"][padding].sum() == 0
        assert not padding[: int((~padding).sum())].any()
    for document, (start, end) in zip(documents, itertools.pairwise(offsets), strict=True):
        np.testing.assert_array_equal(document, tokens[int(start) : int(end)][-(length + 1) :])


def test_rows_are_filled_as_far_as_whole_propositions_go():
    offsets = np.array([0, 5, 10, 15, 18, 40, 43], np.uint64)  # 4, 4, 4, 2, 21 and 2 places
    assert first_propositions(offsets, 10).tolist() == [0, 2, 4, 5, 6]


def make_stream(tmp_path, *phases, **fields) -> TrainingStream:
    """Rows of 32 tokens of a text and a teacher; by default as many of each."""
    data = DataConfig(**{**vars(DATA), **fields})
    teacher = [Document(f"proposition {i:04d}?", f"key {i // 2}", i % 2 == 0) for i in range(120)]
    sources = {"text": [f"text {i:05d}" for i in range(200)], "teacher": teacher}
    schedule = tuple(MixturePhase(*phase) for phase in phases or [((0.5, 0.5), None)])
    return TrainingStream(prepare(data, tmp_path / "data", sources=sources), data, 0, 32, schedule)


def test_a_prepared_teacher_has_its_marks_weights_and_counts(tmp_path):
    prepared = make_stream(tmp_path).prepared
    assert prepared.sources == ("text", "teacher")
    assert [prepared.is_teacher(s) for s in prepared.sources] == [False, True]
    assert prepared.marks == Marks(tuple(TRUE), tuple(FALSE), 3)
    assert prepared.loss_weights("text", "train") is None
    tokens, weights = prepared.tokens("teacher", "train"), prepared.loss_weights("teacher", "train")
    offsets = prepared.offsets("teacher", "train").astype(int)
    assert len(tokens) == len(weights) == offsets[-1]
    for start, end in itertools.pairwise(offsets):
        text, mark = bytes(tokens[start : end - 4].astype(np.uint8)).decode(), bytes(tokens[end - 4 : end].astype("u1"))
        number = int(text.removeprefix("proposition ").removesuffix("?"))
        assert mark == (TRUE if number % 2 == 0 else FALSE)
        assert weights[start:end].tolist() == [0] * (end - start - 4) + [1, 1, 1, 2]


def test_both_propositions_of_an_example_are_on_one_side(tmp_path):
    prepared = make_stream(tmp_path).prepared
    numbers = {}
    for split in ("train", "validation"):
        text = prepared.tokenizer.decode(prepared.tokens("teacher", split))
        numbers[split] = {int(word[:4]) // 2 for word in text.split("proposition ")[1:]}
        assert len(numbers[split]) > 5
    assert numbers["train"].isdisjoint(numbers["validation"])


def test_text_beside_teachers_is_one_segment(tmp_path):
    """Nothing else of it changes."""
    stream = make_stream(tmp_path)
    rows = [stream.samples[n] for n in range(40)]
    texts = [row for row in rows if row["marks"][0] == row["marks"][1]]
    teachers = [row for row in rows if row["marks"][0] != row["marks"][1]]
    assert len(texts) == len(teachers) == 20
    assert {tuple(row["marks"]) for row in teachers} == {(TRUE[3], FALSE[3])}
    for row in texts:
        real = row["weights"] > 0
        assert row["decisive"].sum() == 0
        np.testing.assert_array_equal(row["segment_ids"], real.astype(int))
        np.testing.assert_array_equal(row["positions"], np.arange(32))
    for row in teachers:
        assert set(row["targets"][row["decisive"] > 0]) <= {TRUE[3], FALSE[3]}
        assert row["weights"].sum() == 4 * row["segment_ids"].max()


def test_teacher_weight_scales_the_marks_alone(tmp_path):
    stream = make_stream(tmp_path, teacher_weight=3.0)
    assert {float(w) for n in range(20) for w in stream.samples[n]["weights"]} == {0.0, 1.0, 3.0}


def kinds(stream, count):
    """1 for a sample of the teacher, 0 for a text."""
    marks = (stream.samples[n]["marks"] for n in range(count))
    return [int(true != false) for true, false in marks]


def test_mixed_teachers_are_in_every_batch_at_their_rate(tmp_path):
    stream = make_stream(tmp_path, ((0.75, 0.25), None))
    batches = np.array(kinds(stream, 160)).reshape(-1, 8)
    assert batches.sum(axis=1).tolist() == [2] * 20


def test_alternating_batches_are_of_one_kind_and_lose_nothing(tmp_path):
    """Each kind has its rate of the batches, and each source its order, across the border between phases."""
    stream = make_stream(tmp_path, ((0.75, 0.25), 8 * 13, 8), ((0.75, 0.25), None, 4))
    is_teacher = kinds(stream, 8 * 13 + 4 * 20)
    blocks = [is_teacher[8 * i : 8 * i + 8] for i in range(13)]
    blocks += [is_teacher[104 + 4 * i : 108 + 4 * i] for i in range(20)]
    assert all(len(set(block)) == 1 for block in blocks)
    assert sum(block[0] for block in blocks[:12]) == 3
    assert sum(block[0] for block in blocks[13:]) == 5
    even = dataclasses.replace(stream, schedule=(MixturePhase((0.5, 0.5), None),))
    even_kinds = kinds(even, 400)
    for kind in (0, 1):
        samples = [stream.samples[n]["tokens"].tolist() for n, k in enumerate(is_teacher) if k == kind]
        in_order = [even.samples[n]["tokens"].tolist() for n, k in enumerate(even_kinds) if k == kind]
        assert samples == in_order[: len(samples)]


def test_the_fingerprint_changes_with_marks_and_their_mixing(tmp_path):
    stream = make_stream(tmp_path)
    streams = [
        stream,
        dataclasses.replace(stream, schedule=(MixturePhase((0.5, 0.5), None, 8),)),
        dataclasses.replace(stream, schedule=(MixturePhase((0.5, 0.5), None, 4),)),
        dataclasses.replace(stream, data=dataclasses.replace(stream.data, teacher_weight=2.0)),
        make_stream(tmp_path / "other", true_mark="😡", false_mark="😈"),
    ]
    assert len({variant.fingerprint for variant in streams}) == 5


def test_validation_has_rows_of_both_kinds_text_first(tmp_path):
    marks = make_stream(tmp_path).validation_rows(4)["marks"]
    assert (marks[:, 0] != marks[:, 1]).tolist() == [False] * 4 + [True] * 4


def test_texts_in_a_teacher_and_propositions_in_a_text_are_refused(tmp_path):
    text, proposition = ["a text"], [Document("p?", None, True)]
    for sources in ({"text": proposition, "teacher": proposition}, {"text": text, "teacher": text}):
        with pytest.raises(ConfigError, match="texts and teachers are sources apart"):
            prepare(DATA, tmp_path / "data", sources=sources)


def test_a_new_template_needs_no_registry():
    template = Template("{q} {label}\n", {"a": "right", "b": "wrong"}, label_field="answer")
    assert [d.text for d in propositions({"q": "Q", "answer": "b"}, template)] == ["Q wrong\n", "Q right\n"]
