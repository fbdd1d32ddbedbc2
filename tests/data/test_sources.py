"""Sources of documents: built-in corpora and text files, and what they say about bad input."""

import gzip
import json
import lzma
import sys

import pytest

from flmjax.config import ConfigError
from flmjax.data.sources import hsk, python_docs, text_source
from flmjax.data.sources.documents import Document


def read_source(name, split_by="text"):
    """Texts of the documents."""
    return [d.text if isinstance(d, Document) else d for d in text_source(name, split_by).read()]


@pytest.fixture(scope="module")
def english() -> list[str]:
    return list(read_source("python_docs"))


def test_python_docs_are_two_megabytes_of_distinct_documents(english):
    assert sum(len(text.encode()) for text in english) > 1_500_000
    assert len(english) > 800
    assert len(set(english)) == len(english)
    assert min(map(len, english)) >= python_docs.MIN_CHARACTERS


def test_python_docs_have_topics_and_docstrings_with_headings(english):
    assert any(text.startswith('The "assert" statement') for text in english)
    counter = next(text for text in english if text.startswith("class Counter(dict)"))
    assert "\n\nCounter.most_common(self, n=None)\n\nList the n most common elements" in counter


def test_python_docs_neither_run_modules_nor_read_test_packages(english):
    assert "antigravity" not in sys.modules  # importing it opens a web browser
    assert not any(text.startswith(("module test.", "module idlelib", "module lib2to3")) for text in english)


def test_hsk_documents_are_groups_of_chinese_and_english_lines():
    pytest.importorskip("hsk_sentences_audio")
    documents = list(read_source("hsk"))
    pairs = [pair.split("\n") for text in documents for pair in text.split("\n\n")]
    assert 4_000 < len(pairs) <= 4_354
    assert all(len(pair) == 2 for pair in pairs)
    assert sum(any("\u4e00" <= c <= "\u9fff" for c in chinese) for chinese, _ in pairs) > 0.99 * len(pairs)
    assert sum(english.isascii() for _, english in pairs) > 0.95 * len(pairs)
    assert all(1 <= text.count("\n\n") + 1 <= 12 for text in documents)


def test_hsk_without_its_package_names_the_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "hsk_sentences_audio", None)
    with pytest.raises(ConfigError, match=r"pip install 'flmjax\[data\]'"):
        next(hsk.documents())


def test_two_blank_lines_separate_txt_documents(tmp_path):
    """Nothing else of the text changes."""
    (tmp_path / "a.txt").write_text("\n\n  one\n\nstill one \n\n \ntwo\ttabs\n\n\n\n\nthree\n\n", newline="")
    assert list(read_source(str(tmp_path / "a.txt"))) == ["  one\n\nstill one ", "two\ttabs", "three"]


def test_one_blank_line_separates_docs_txt_documents(tmp_path):
    (tmp_path / "a.docs.txt").write_text("one\nmore\n\ntwo\n\n\nthree")
    assert list(read_source(str(tmp_path / "a.docs.txt"))) == ["one\nmore", "two", "three"]


def test_a_markdown_file_is_one_document(tmp_path):
    (tmp_path / "a.md").write_text("# one\n\n\n\ntext\n")
    assert list(read_source(str(tmp_path / "a.md"))) == ["# one\n\n\n\ntext"]


def test_carriage_returns_stay_inside_and_a_byte_order_mark_goes(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\nmore\r\n\r\n\r\ntwo\r\n")
    assert list(read_source(str(tmp_path / "a.txt"))) == ["one\r\nmore", "two"]


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path):
    """Compressed files too."""
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.txt.gz").write_bytes(gzip.compress("压缩".encode()))
    (tmp_path / "b" / "a.docs.txt.xz").write_bytes(lzma.compress(b"x1\n\nx2"))
    (tmp_path / "c.md").write_text("c")
    (tmp_path / "a.TXT").write_text("a")
    (tmp_path / "d.csv").write_text("not read")
    assert list(read_source(str(tmp_path))) == ["a", "x1", "x2", "压缩", "c"]


def test_a_glob_takes_what_matches_and_only_files(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    for name in ("2.csv", "1.csv", "3.txt"):
        (tmp_path / name).write_text(name)
    assert list(read_source(f"{tmp_path}/*.csv")) == ["1.csv", "2.csv"]


def test_bytes_that_are_not_utf8_are_named_with_file_and_offset(tmp_path):
    (tmp_path / "bad.txt").write_bytes("good 好\nline ".encode() + b"\xff rest")
    with pytest.raises(ConfigError, match=r"bad\.txt: not UTF-8 at byte 14 \(0xFF\)"):
        list(read_source(str(tmp_path)))


@pytest.mark.parametrize("name", ["cut.txt.xz", "cut.txt.gz", "noise.txt.xz", "noise.txt.gz"])
def test_a_broken_archive_is_named(tmp_path, name):
    compress = lzma.compress if name.endswith("xz") else gzip.compress
    (tmp_path / name).write_bytes(compress(b"text " * 1000)[:-20] if "cut" in name else b"no archive at all")
    with pytest.raises(ConfigError, match=f"{name}: not a complete"):
        list(read_source(str(tmp_path)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pyton_docs", "'pyton_docs' is neither a built-in source nor a path; did you mean python_docs"),
        ("zzzz", "choices: hsk, python_docs"),
        ("no/such/file.txt", "no file or folder 'no/such/file.txt'"),
        ("no/such/*.txt", r"no file matches 'no/such/\*\.txt'"),
    ],
)
def test_an_unknown_source_is_named_at_once(source, message):
    with pytest.raises(ConfigError, match=message):
        read_source(source)


def test_a_folder_without_text_files_is_named(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"x")
    with pytest.raises(ConfigError, match=rf"folder '{tmp_path}' holds no \.txt or \.md"):
        read_source(str(tmp_path))


def test_json_lines_are_texts_or_instructions_and_name_their_side(tmp_path):
    lines = [
        {"text": "one", "key": "k"},
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        {"instruction": "问", "output": "答"},
    ]
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines))
    assert read_source(str(tmp_path)) == ["one", "Add.\n\n1 1\n\n2", "问\n\n答"]
    assert [d.key for d in text_source(str(tmp_path)).read()] == ["k", None, None]
    assert [d.key for d in text_source(str(tmp_path), "path").read()] == ["k", "a.jsonl: line 3", "a.jsonl: line 5"]
    (tmp_path / "a.jsonl").write_text('{"text": "one", "key": null}')
    assert [d.key for d in text_source(str(tmp_path)).read()] == [None]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": 1}', r'line 2 has neither "text" nor "instruction" and "output"; it has: text'),
        (b"{", r"a\.jsonl: line 2 is not JSON"),
        (b'"text"', r"a\.jsonl: line 2 is no JSON object but"),
        (b'{"text": "a", "key": 5}', r'line 2: its "key" is 5, but must be a text'),
        (b'{"instruction": "a", "input": ["b"], "output": "c"}', "line 2 has neither"),
        (b'{"text": "\\ud83d"}', "line 2 holds half of a surrogate pair"),
        (b'{"text": ' + b"[" * 100_000, "line 2 is not JSON"),
        (b'{"text": "\xff"}', r"a\.jsonl: not UTF-8 at byte 11 \(0xFF\)"),
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_bytes(b"\n" + line)
    with pytest.raises(ConfigError, match=message):
        read_source(str(tmp_path))


def test_parallel_pages_of_two_folders_have_one_key(tmp_path):
    for language in ("en", "zh"):
        (tmp_path / language / "deep").mkdir(parents=True)
        (tmp_path / language / "deep" / "page.txt").write_text(f"{language} one\n\n\n{language} two")
    keys = [[d.key for d in text_source(f"{tmp_path}/{lang}", "path").read()] for lang in ("en", "zh")]
    assert keys[0] == keys[1] == ["deep/page.txt"] * 2
    by_glob = [d.key for d in text_source(f"{tmp_path}/zh/**/*.txt", "path").read()]
    assert by_glob == keys[0]
    assert [d.key for d in text_source(f"{tmp_path}/en").read()] == [None, None]


def test_a_stamp_changes_with_the_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = text_source(str(tmp_path)).stamp
    assert before == text_source(str(tmp_path)).stamp
    path.write_text("more")
    assert before != text_source(str(tmp_path)).stamp
