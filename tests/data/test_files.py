"""The walker: which files a name, a folder and a glob stand for, and what is left out."""

import bz2
import errno
import gzip
import lzma
import os
import sys
import unicodedata
from pathlib import Path

import pytest

from flmjax.config import ConfigError, DataConfig
from flmjax.data.sources import text_source
from flmjax.data.sources.freelm import teacher_source


def files_of(source, split_by="text"):
    return text_source(str(source), split_by).files


def names_of(source):
    files = files_of(source)
    return [str(path.relative_to(files.root)) for path in files.paths]


def write(folder: Path, *names: str) -> Path:
    """Files whose text is their name."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, errors="backslashreplace")
    return folder


def texts_of(source):
    return sorted(document.text for document in text_source(str(source)).read())


def test_links_to_folders_and_files_are_followed(tmp_path):
    """cytomining/CytoTable#441: three files beside a link to a folder of five were read, exit 0."""
    folder = write(tmp_path / "text", "1.txt", "2.txt", "3.txt")
    write(tmp_path / "elsewhere", *(f"{i}.txt" for i in range(4, 8)), "deep/8.txt")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    write(tmp_path, "single.txt")
    (folder / "9.txt").symlink_to(tmp_path / "single.txt")
    assert len(texts_of(folder)) == 9
    assert len(texts_of(f"{folder}/**/*.txt")) == 9
    assert len(texts_of(f"{folder}/*/*.txt")) == 4


@pytest.mark.parametrize("target", [".", "..", "../..", "sub", "twin"])
def test_a_loop_of_links_ends_and_no_file_comes_twice(tmp_path, target):
    folder = write(tmp_path / "parent" / "text", "a.txt", "sub/b.txt")
    write(tmp_path, "outside.txt", "parent/beside.txt")
    (folder / "sub" / "loop").symlink_to(folder / target)
    (folder / "twin").symlink_to(folder / "sub" / "loop" if target == "twin" else folder / "sub")
    if target == "twin":
        with pytest.raises(ConfigError, match=r"twin', a link to '.*loop', cannot be read: Too many levels"):
            texts_of(folder)
        return
    assert texts_of(folder) == texts_of(f"{folder}/**") == ["a.txt", "sub/b.txt"]
    assert files_of(folder).counts() == ({"link to a folder above": 1} if "." in target and target != "." else {})


def test_a_file_of_several_links_counts_once_by_its_own_name(tmp_path):
    folder = write(tmp_path / "text", "b/real.txt")
    (folder / "a.txt").symlink_to(folder / "b" / "real.txt")
    (folder / "c").symlink_to(folder / "b")
    os.link(folder / "b" / "real.txt", folder / "z.txt")
    assert names_of(folder) == ["b/real.txt"]
    assert names_of(f"{folder}/**/*.txt") == ["b/real.txt"]


def test_what_a_folder_leaves_out_is_counted_by_suffix(tmp_path):
    """Files seen are files read and files left out."""
    folder = write(tmp_path, "a.txt", "corpus.json", "x.ndjson", "README", "LICENSE", "notes.rst", "t.tar.gz")
    write(folder, ".hidden/h.txt", ".h.txt", "sub/.git/config", "sub/p.PARQUET", "sub/q.parquet")
    (folder / "b.txt.bz2").write_bytes(bz2.compress(b"b"))
    (folder / "c4.json.gz").write_bytes(gzip.compress(b'{"text": "c4"}'))
    os.mkfifo(folder / "pipe.txt")
    files = files_of(folder)
    assert [path.name for path in files.paths] == ["a.txt", "b.txt.bz2", "c4.json.gz", "corpus.json", "x.ndjson"]
    assert files.counts() == {
        ".parquet": 2,
        ".rst": 1,
        ".tar.gz": 1,
        "hidden": 3,
        "no regular file": 1,
        "without suffix": 2,
    }
    seen = [p for p in folder.rglob("*") if not p.is_dir() and not any(x.startswith(".") for x in p.parts)]
    assert len(files.paths) + sum(files.counts().values()) - 3 == len(seen)


def test_a_glob_leaves_out_formats_that_are_no_text(tmp_path):
    """A suffix that is unknown, or none, is plain text: the glob names it."""
    folder = write(
        tmp_path, "a.txt", "b.csv", "README", "p.parquet", ".h.txt", "sub/c.rst", "sub/.h/d.txt", "sub/e.zip"
    )
    assert names_of(f"{folder}/*") == ["README", "a.txt", "b.csv"]
    assert files_of(f"{folder}/*").counts() == {".parquet": 1}
    assert names_of(f"{folder}/**") == ["README", "a.txt", "b.csv", "sub/c.rst"]
    assert names_of(f"{folder}/.*") == [".h.txt"]
    assert names_of(f"{folder}/s?b/[a-d].*") == ["sub/c.rst"]
    with pytest.raises(ConfigError, match=r"no file matches '.*' that can be read; left out: 1 \.zip \(e\.zip\)"):
        files_of(f"{folder}/*/*.zip")


@pytest.mark.parametrize("name", ["notes.rst", "README", "a.log", "b.csv", ".hidden"])
def test_a_file_that_is_named_itself_is_plain_text(tmp_path, name):
    write(tmp_path, name)
    assert texts_of(tmp_path / name) == [name]


@pytest.mark.parametrize("name", ["a.parquet", "a.ZIP", "a.tar.gz", "a.pdf", "a.docx", "a.npz", "a.txt.lz4"])
def test_a_file_of_another_format_is_refused_with_its_suffix(tmp_path, name):
    write(tmp_path, name)
    suffix = "".join(Path(name.lower()).suffixes[-1:] if "tar" not in name else [".tar", ".gz"])
    with pytest.raises(
        ConfigError, match=rf"data\.sources: '.*{name}' is a \{suffix} file, not text: convert or unpack"
    ):
        files_of(tmp_path / name)


def test_a_teachers_folder_is_read_for_records_alone(tmp_path):
    write(tmp_path, "README.md", "notes.txt", "a.jsonl", "b.ndjson.gz", "c.json", "d.csv")
    for name in (str(tmp_path), f"rte:{tmp_path}", f"translation:{tmp_path}"):
        files = teacher_source(name, DataConfig()).files
        assert [path.name for path in files.paths] == ["a.jsonl", "b.ndjson.gz", "c.json"]
        assert files.counts() == {".csv": 1, ".md": 1, ".txt": 1}
    assert teacher_source(f"topic:{tmp_path}", DataConfig()).files.counts() == {".csv": 1}
    with pytest.raises(ConfigError, match=r"data\.teachers: '.*d\.parquet' is a \.parquet file"):
        teacher_source(f"rte:{write(tmp_path, 'd.parquet')}/d.parquet", DataConfig())


@pytest.mark.parametrize("pattern", ["", "/**/*.txt", "/*/*.txt"])
def test_an_unreadable_folder_is_named(tmp_path, monkeypatch, pattern):
    write(tmp_path, "a.txt", "locked/b.txt")
    real = os.scandir

    def scandir(path):
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ConfigError, match=r"data\.sources: folder '.*locked' cannot be read: Permission denied"):
        files_of(f"{tmp_path}{pattern}")


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    write(tmp_path, "a.txt", "b.txt")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "b.txt")
    for source in (tmp_path, tmp_path / "b.txt", f"{tmp_path}/*.txt"):
        with pytest.raises(ConfigError, match=r"data\.sources: '.*b\.txt' cannot be read: permission denied"):
            files_of(source)


def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch):
    write(tmp_path, "a.txt")
    source = text_source(str(tmp_path))
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ConfigError, match=r"a\.txt cannot be read: No such file"):
        list(source.read())


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    folder = write(tmp_path / "text", "a.txt")
    (folder / "b.txt").symlink_to("gone.txt")
    for source in (folder, folder / "b.txt", f"{folder}/*.txt"):
        with pytest.raises(ConfigError, match=r"b\.txt', a link to 'gone\.txt', cannot be read: No such file"):
            files_of(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "a source is empty"),
        (" ", "a source is empty"),
        ("x" * 300, "cannot be read: File name too long"),
        ("a\0b", "cannot be read: embedded null byte"),
        ("/dev/null", "is neither a regular file nor a folder"),
        ("~nobody-of-that-name/x", "nobody-of-that-name|home"),
        ("none/*.txt", "no file matches"),
        ("/*none*/**", "no file matches"),
    ],
)
def test_a_name_that_cannot_be_a_source_is_one_line(source, message):
    with pytest.raises(ConfigError, match=rf"data\.sources: .*({message})"):
        files_of(source)


def test_zstandard_without_a_package_names_it(tmp_path, monkeypatch):
    for module in ("zstandard", "compression.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    write(tmp_path, "a.txt", "part.jsonl.zst")
    for source in (tmp_path, tmp_path / "part.jsonl.zst", f"{tmp_path}/*"):
        with pytest.raises(ConfigError, match=r"part\.jsonl\.zst' needs a package; pip install zstandard"):
            files_of(source)


def test_names_composed_and_decomposed_have_one_key(tmp_path):
    """RotorHazard/FPVTracksideCore#75: a file's name in NFC on one machine is in NFD on another."""
    names = [f"page {i} Żółć é 한글.txt" for i in range(200)]
    for form, language in (("NFC", "en"), ("NFD", "zh")):
        (tmp_path / language).mkdir()
        for name in names:
            (tmp_path / language / unicodedata.normalize(form, name)).write_text(f"{language} {name}")
    keys = [{d.key for d in text_source(f"{tmp_path}/{lang}", "path").read()} for lang in ("en", "zh")]
    assert keys[0] == keys[1]
    assert len(keys[0]) == 200


def test_a_compressed_page_has_the_key_of_the_plain_page(tmp_path):
    write(tmp_path, "en/a.txt", "en/b.jsonl")
    (tmp_path / "en" / "b.jsonl").write_text('{"text": "one"}')
    (tmp_path / "zh").mkdir()
    (tmp_path / "zh" / "a.txt.gz").write_bytes(gzip.compress(b"a"))
    (tmp_path / "zh" / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "two"}'))
    keys = [[d.key for d in text_source(f"{tmp_path}/{lang}", "path").read()] for lang in ("en", "zh")]
    assert keys[0] == keys[1] == ["a.txt", "b.jsonl: line 1"]


def test_names_of_any_bytes_are_keys_and_sources(tmp_path):
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/" + "文件夹".encode("gbk"))
    name = os.fsdecode("名字.txt".encode("gbk"))
    write(Path(folder), name)
    (document,) = text_source(folder, "path").read()
    assert document.key.encode("utf-8", "surrogateescape") == "名字.txt".encode("gbk")
    (document,) = text_source(f"{folder}/*", "path").read()
    assert document.key.encode("utf-8", "surrogateescape") == "名字.txt".encode("gbk")


def zstandard_compress(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").compress(data)


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress), (".zst", zstandard_compress)],
)
def test_a_compressed_file_is_read_over_all_its_frames(tmp_path, suffix, compress):
    """Files of several frames come from pigz, pixz, pbzip2 and pzstd; padding and frames to be skipped hold no text."""
    frames = [compress(f"part {i}\n".encode() * 20_000) for i in range(3)]
    between = {".zst": b"\x50\x2a\x4d\x18\x03\x00\x00\x00abc", ".xz": bytes(4)}.get(suffix, b"")
    path = tmp_path / f"a.md{suffix}"
    path.write_bytes(frames[0] + between + frames[1] + frames[2] + between)
    expected = "".join(f"part {i}\n" * 20_000 for i in range(3))[:-1]
    assert texts_of(path) == [expected]
    for content in (frames[0] + frames[1][:-4], frames[0] + b"garbage!" * 9, b"garbage!", frames[0][:5], b""):
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"a\.md\{suffix}: not a complete \{suffix} file"):
            texts_of(path)
