"""Sources of documents: built-in corpora and text files, and what they say about bad input."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from flmjax.config import ConfigError, DataConfig
from flmjax.data.sources import python_docs, text_files, text_source
from flmjax.data.sources.documents import Document
from flmjax.data.sources.freelm import teacher_source


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


def test_hsk_without_its_package_names_the_install_command_at_once(monkeypatch):
    teacher = lambda name: teacher_source(name, DataConfig())
    monkeypatch.setitem(sys.modules, "hsk_sentences_audio", None)
    for name, source in (("hsk", text_source), ("hsk_levels", teacher), ("hsk_translations", teacher)):
        with pytest.raises(ConfigError, match=r"pip install 'flmjax\[data\]'"):
            source(name)


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


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-32-le"])
@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl", "a.json", "array.json"])
def test_text_in_utf_16_is_refused_with_its_file(tmp_path, encoding, name):
    """Without a byte order mark, English in UTF-16 is UTF-8 with NUL characters."""
    text = "some words\n" if name in ("a.txt", "a.md") else '{"text": "some words"}\n'
    (tmp_path / name).write_bytes((f"[{text}]" if name == "array.json" else text).encode(encoding))
    with pytest.raises(ConfigError, match=rf"{name}: .*convert the file"):
        list(read_source(str(tmp_path)))


def test_a_nul_character_is_named_with_its_place(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"some\nwords\0\n")
    with pytest.raises(ConfigError, match=r"a\.txt: line 2 holds a NUL character, .*convert the file to UTF-8"):
        list(read_source(f"{tmp_path}/a.txt"))
    (tmp_path / "a.json").write_bytes('[\n{"text": "文'.encode() + b'\0"}]')
    with pytest.raises(ConfigError, match=r"a\.json: byte 15 holds a NUL character"):
        list(read_source(f"{tmp_path}/a.json"))
    (tmp_path / "a.jsonl").write_text('{"text": "the escape \\\\u0000"}\n{"text": "a NUL \\u0000"}')
    with pytest.raises(ConfigError, match=r"a\.jsonl: line 2 holds a NUL character \(\\u0000\).*remove it"):
        list(read_source(f"{tmp_path}/a.jsonl"))


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
        ("no/such.txt", rf"'no/such.txt' \(tried {Path.cwd()}/no/such.txt\)$"),
        ("no/such/*.txt", rf"\(tried {Path.cwd()}/no/such/\*\.txt\)$"),
        ("texts", rf"'texts' is neither a built-in source nor a path; .* \(tried {Path.cwd()}/texts\)$"),
        ("/no/such.txt", "no file or folder '/no/such.txt'$"),
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


RECORDS = [{"text": f"text {i} \n\n\n 文", "more": [i, {"text": "]"}]} for i in range(5)]
TEXTS = [record["text"] for record in RECORDS]


@pytest.mark.parametrize("compression", ["", ".gz", ".xz", ".bz2"])
@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".JSON"])
def test_json_lines_are_as_many_documents_as_lines(tmp_path, suffix, compression):
    """datajuicer/data-juicer#919: JSON lines under another suffix became one document."""
    compress = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}[compression]
    path = tmp_path / f"a{suffix}{compression}"
    path.write_bytes(compress("\n".join(json.dumps(record) for record in RECORDS).encode()))
    for source in (path, tmp_path, f"{tmp_path}/*"):
        assert read_source(str(source)) == TEXTS


@pytest.mark.parametrize("indent", [None, 0, 2])
@pytest.mark.parametrize("value", ["array", "objects", "nothing"])
def test_a_json_file_may_be_an_array_or_objects_over_lines(tmp_path, monkeypatch, value, indent):
    monkeypatch.setattr(text_files, "BLOCK", 7)  # every record is cut by blocks
    path = tmp_path / "a.json"
    match value:
        case "array":
            path.write_text("\ufeff \n" + json.dumps(RECORDS, indent=indent, ensure_ascii=False) + "\n")
        case "objects":
            path.write_text("\n".join(json.dumps(record, indent=indent) for record in RECORDS))
        case "nothing":
            path.write_text("[\n]")
    assert read_source(str(path)) == ([] if value == "nothing" else TEXTS)
    if value == "array":
        keys = [document.key for document in text_source(str(path), "path").read()]
        assert keys[:2] == ["a.json: record 1", "a.json: record 2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"text": "b"', r"a\.json: record 2 is no JSON or longer than"),
        ('[{"text": "a"}', "the array has no end after 1 records"),
        ('[{"text": "a"}] {"text": "b"}', "there is text after the array"),
        ('[{"text": "a"}, 5]', "record 2 is no JSON object but 5"),
        ('["a", "b"]', 'record 1 is no JSON object but "a"'),
        ('{\n "data": [{"text": "a"}]\n}', 'record 1 has neither "text" nor .* it has: data'),
        ('{\n "text": \n}', "record 1 is no JSON"),
        ("text", "line 1 is not JSON"),
        ('[{"text": "' + "\\ud83d" + '"}]', "record 1 holds half of a surrogate pair"),
        ("[" * 100_000, "record 1 is no JSON"),
    ],
)
def test_a_json_file_of_other_content_is_refused(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_source(str(tmp_path))


@pytest.mark.parametrize("name", ["a", "a.txt", "a.md", "a.jl", "a.data.gz", "a.docs.txt"])
@pytest.mark.parametrize(
    "content",
    [
        '{"text": "a"}\n{"text": "b"}',
        '\n [{"text": "a"}, {"text": "b"}]',
        '{"instruction": "a", "output": "b"}',
    ],
)
def test_json_records_under_a_suffix_of_text_are_refused(tmp_path, name, content):
    """datajuicer/data-juicer#919."""
    raw = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    with pytest.raises(ConfigError, match=rf"{name}: its first line is a JSON record, but .* call it \.jsonl"):
        read_source(str(tmp_path / name))


@pytest.mark.parametrize("content", ["{text}", '{"a": 1}\n{"a": 2}', "[1] Smith et al.", '["text"]', "{", "[{"])
def test_text_that_begins_with_a_brace_is_text(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    assert read_source(str(tmp_path)) == [content]


@pytest.mark.parametrize("value", [0, 0.0, False, 5, True, [], {}, ["a"]])
@pytest.mark.parametrize("field", ["text", "instruction", "input", "output"])
def test_a_field_that_is_no_text_is_refused_if_it_is_false_too(tmp_path, field, value):
    """NVIDIA-NeMo/Megatron-Bridge#5907: a field of 0 was taken for a missing one."""
    record = {"instruction": "add", "input": "1", "output": "5", field: value}
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps(record))
    with pytest.raises(ConfigError, match=r'a\.jsonl: line 2 has neither "text" nor'):
        read_source(str(tmp_path))


@pytest.mark.parametrize("field", ["text", "input", "key"])
def test_a_field_that_is_null_is_missing(tmp_path, field):
    (tmp_path / "a.jsonl").write_text(json.dumps({"instruction": "add", "output": "5", field: None}))
    (document,) = text_source(str(tmp_path)).read()
    assert document == Document("add\n\n5")


@pytest.mark.parametrize("value", [0, False, [], {}])
def test_a_key_of_zero_is_refused_everywhere(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(json.dumps({**RECORDS[0], "key": value}))
    (tmp_path / "t.jsonl").write_text(json.dumps({"premise": "a", "hypothesis": "b", "label": 0, "key": value}))
    for source in (text_source(f"{tmp_path}/a.jsonl"), teacher_source(f"rte:{tmp_path}/t.jsonl", DataConfig())):
        with pytest.raises(ConfigError, match=r'line 1: its "key" is .*, but must be a text'):
            list(source.read())


def test_keys_of_records_are_equal_composed_and_decomposed(tmp_path):
    lines = [json.dumps({"text": "a", "key": unicodedata.normalize(form, "Żółć")}) for form in ("NFC", "NFD")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert len({document.key for document in text_source(str(tmp_path)).read()}) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '\n{"text": "' + "a" * 1000 + '"}', r"a\.jsonl: line 2 is longer than .*; divide it"),
        ("a.txt", "one\n\n\ntwo " + "a" * 1000, r"a\.txt: line 4 is longer"),
        ("a.txt", "one\n\n\n" + "two 文\n\n" * 120, r"a\.txt: the document at line 4 is .* \(in this file two blank"),
        ("a.jsonl", json.dumps({"text": "文" * 400}, ensure_ascii=False), r"a\.jsonl: line 1 is longer"),
        ("a.docs.txt", "one\n\n" + "two\n" * 300, r"the document at line 3 is .* \(in this file a blank line ends one"),
        ("a.md", "\none\n\n\n" * 300, r"the document at line 2 is .* \(in this file the end of the file ends"),
        ("a.md", "a\n" + "\n" * 2000, r"the document at line 1 is"),
        ("a.json", '[{"text": "a"}, {"text": "' + "a" * 5000, r"a\.json: record 2 is no JSON or longer than"),
        ("a.json", '[{"text": "a"}, {"text": "' + "a" * 5000 + '"}]', r"record 2 is no JSON or longer than"),
    ],
)
def test_a_document_has_a_greatest_size(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(text_files, "MAX_DOCUMENT_BYTES", 1000)
    monkeypatch.setattr(text_files, "BLOCK", 100)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(content.encode()))
    with pytest.raises(ConfigError, match=message.replace(name.replace(".", r"\."), rf"{name}\.gz")):
        read_source(str(tmp_path))


def test_memory_does_not_grow_with_a_long_line_in_a_small_file(tmp_path):
    """A gz of some 600 kB that holds one line of 600 MB took more than twice that in memory."""
    zeros = b"a" * (1 << 20)
    for name in ("a.jsonl.gz", "a.json.gz", "a.txt.gz"):
        with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
            file.write(b'[{"text": "' if name == "a.json.gz" else b"")
            for _ in range(600):
                file.write(zeros)
        code = (
            "import sys; from flmjax.config import ConfigError; from flmjax.data.sources import text_source\n"
            "try: list(text_source(sys.argv[1]).read())\n"
            "except ConfigError as error: print(error)\n"
            "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')).split()[1])"
        )
        line = [sys.executable, "-c", code, str(tmp_path / name)]
        message, kilobytes = subprocess.run(line, capture_output=True, text=True, check=True).stdout.splitlines()
        assert "longer than 64 MiB" in message
        assert int(kilobytes) < 400_000, name


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
