"""Files of the settings' sources from name to token files: what is said of them, in every locale."""

import json
import os
import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest

from flmjax import cli
from flmjax.config import ConfigError, DataConfig
from flmjax.data.inspection import summary
from flmjax.data.loader import TrainingStream
from flmjax.data.mixture import MixturePhase
from flmjax.data.prepare import prepare
from flmjax.data.vocabulary_training import train_model


def write(folder: Path, count: int, first: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        (folder / f"{i}.txt").write_text(f"text {i}")
    return folder


def of(*sources, **fields) -> DataConfig:
    return DataConfig(
        **{"sources": tuple(map(str, sources)), "vocabulary": "bytes", "validation_fraction": 0.2, **fields}
    )


def documents_of(prepared, source) -> int:
    return sum(prepared.meta["sources"][source][split]["documents"] for split in ("train", "validation"))


# ---- what is left out -----------------------------------------------------------------------------------------------


def test_files_left_out_are_said_once_and_stored(tmp_path, capsys):
    folder = write(tmp_path / "text", 30)
    for name in ("README", "notes.rst", "b.rst"):
        (folder / name).write_text("x")
    (folder / ".git").mkdir()
    prepared = prepare(of(folder), tmp_path / "data")
    left_out = "2 .rst (b.rst, ...), 1 hidden (.git), 1 without suffix (README)"
    assert capsys.readouterr().err == f"flmjax: data.sources: '{folder}': 30 files; left out: {left_out}\n"
    stored = prepared.meta["sources"][str(folder)]
    assert (stored["files"], stored["files_left_out"]) == (30, {".rst": 2, "hidden": 1, "without suffix": 1})
    schedule = (MixturePhase((1.0,), None),)
    assert f"{folder}: 30 files; left out: 2 .rst, 1 hidden, 1 without suffix" in summary(
        TrainingStream(prepared, DataConfig(), 0, 8, schedule)
    )
    prepare(of(folder), tmp_path / "data")
    assert capsys.readouterr().err == ""


def test_a_folder_of_text_alone_says_nothing(tmp_path, capsys):
    prepare(of(write(tmp_path / "text", 30)), tmp_path / "data")
    assert capsys.readouterr().err == ""


# ---- one folder, many spellings ---

SPELLINGS = ["text/", "./text", "text//", "./text/.", "TMP/text", "link", "text/*.txt", "text/**"]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", ["sources", "teachers"])
def test_one_folder_by_two_names_is_refused(tmp_path, monkeypatch, spelling, kind):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "text", 30)
    (tmp_path / "link").symlink_to("text")
    prefix = "topic:" * (kind == "teachers")
    names = (f"{prefix}text", prefix + spelling.replace("TMP", str(tmp_path)))
    data = of(**{"sources": ("hsk",), kind: names})
    both = " and ".join(re.escape(f"'{name}'") for name in names)
    with pytest.raises(ConfigError, match=rf"data\.{kind}: {both} are the same files; name them once"):
        prepare(data, tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_files_that_two_sources_share_are_said(tmp_path, capsys):
    """A teacher may judge the paragraphs of a text that is also a source."""
    folder = write(tmp_path / "text", 30)
    write(folder / "more", 20, first=30)
    for path in folder.rglob("*.txt"):
        path.write_text(f"{path.name} {'word ' * 20}\n\n{path.name} {'other ' * 20}")
    prepare(of(folder, folder / "more", teachers=(f"topic:{folder}",)), tmp_path / "data")
    both = f"'{folder}' and '{folder}/more'"
    assert capsys.readouterr().err == f"flmjax: data.sources: 20 files are in both {both}; they are read for each\n"


@pytest.mark.parametrize("spelling", SPELLINGS[:4])
def test_other_spellings_of_a_path_are_the_same_settings(tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(tmp_path)
    for path in write(tmp_path / "text", 30).iterdir():
        path.write_text(f"{path.name} {'word ' * 20}\n\n{path.name} {'other ' * 20}")
    meta = prepare(of("text", teachers=("topic:text",)), tmp_path / "data").meta
    other = of(spelling, teachers=(f"topic:{spelling}",))
    assert prepare(other, tmp_path / "data").meta == meta
    assert prepare(other, tmp_path / "anew").meta == meta


@pytest.mark.parametrize("name", ["./hsk", ".//hsk/", "hsk/"])
def test_a_folder_with_the_name_of_a_built_in_source_is_that_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "hsk", 30)
    prepared = prepare(of(name, "hsk"), tmp_path / "data")
    assert prepared.sources == ("./hsk", "hsk")
    assert documents_of(prepared, "./hsk") == 30
    with pytest.raises(ConfigError, match=r"data\.sources"):
        prepare(of("hsk"), tmp_path / "data")


# ---- changes --------------------------------------------------------------------------------------------------------


def add(folder: Path) -> None:
    write(folder, 10, first=30)


def change(folder: Path) -> None:
    (folder / "3.txt").write_text("changed text 3")


def remove(folder: Path) -> None:
    (folder / "3.txt").unlink()


def rename(folder: Path) -> None:
    (folder / "3.txt").rename(folder / "x.txt")


@pytest.mark.parametrize(("act", "files"), [(add, 40), (change, 30), (remove, 29), (rename, 30)])
@pytest.mark.parametrize("kind", ["folder", "glob", "topic"])
def test_sources_that_changed_since_are_said(tmp_path, capsys, act, files, kind):
    """hughperkins/xlm-core#50: a cache of prepared text went on being used after its files had changed."""
    folder = write(tmp_path / "text", 30)
    paragraph = "a paragraph that is long enough to be one of a topic, number {}"
    for path in folder.iterdir():
        path.write_text(f"{path.name} {paragraph.format(1)}\n\n{path.name} {paragraph.format(2)}")
    fixed = write(tmp_path / "fixed", 30)
    name = {"folder": str(folder), "glob": f"{folder}/*.txt", "topic": f"topic:{folder}"}[kind]
    data = of(fixed, teachers=(name,)) if kind == "topic" else of(fixed, name)
    before = prepare(data, tmp_path / "data").meta
    capsys.readouterr()
    act(folder)
    again = prepare(data, tmp_path / "data")
    assert again.meta == before
    (line,) = capsys.readouterr().err.splitlines()
    field = "data.teachers" if kind == "topic" else "data.sources"
    assert line.startswith(f"flmjax: {field}: '{name}' has changed since {tmp_path}/data was prepared (30 files then, ")
    assert f"{files} now); its old text is used. To prepare it anew, delete that folder, or set data.directory" in line


@pytest.mark.parametrize("act", ["replace", "damage", "touch", "remove"])
def test_a_vocabulary_file_that_changed_since_is_said(tmp_path, capsys, act):
    model = tmp_path / "v.model"
    pieces = [train_model([f"{word} of some text"] * 50, 280) for word in ("words", "parts")]
    model.write_bytes(pieces[0])
    data = of(write(tmp_path / "text", 30), vocabulary=str(model))
    before = prepare(data, tmp_path / "data").meta
    assert capsys.readouterr().err == ""
    {
        "replace": lambda: model.write_bytes(pieces[1]),
        "damage": lambda: model.write_bytes(b"x"),
        "touch": lambda: os.utime(model),
        "remove": model.unlink,
    }[act]()
    assert prepare(data, tmp_path / "data").meta == before
    line = (
        f"flmjax: data.vocabulary: '{model}' has changed since {tmp_path}/data was prepared; its old pieces are used. "
    )
    cure = "To prepare it anew, delete that folder, or set data.directory to another one\n"
    assert capsys.readouterr().err == (line + cure) * (act in ("replace", "damage"))


def test_sources_that_are_gone_or_unstamped_are_no_change(tmp_path, capsys):
    """Prepared data are enough on a machine without the text; older directories have no stamps."""
    data = of(write(tmp_path / "text", 30), write(tmp_path / "more", 30))
    meta = prepare(data, tmp_path / "data").meta
    (tmp_path / "text").rename(tmp_path / "archived")
    assert prepare(data, tmp_path / "data").meta == meta
    for counts in meta["sources"].values():
        for name in ("stamp", "files", "files_left_out"):
            del counts[name]
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta))
    write(tmp_path / "more", 10, first=30)
    prepare(data, tmp_path / "data")
    assert capsys.readouterr().err == ""


# ---- nothing is left behind -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"sources": ("TMP/txet",)},
        {"sources": ("TMP/text", "pyton_docs")},
        {"sources": ("TMP/text/a.parquet",)},
        {"teachers": ("rtee:TMP/text",)},
        {"teachers": ("rte:TMP/text",)},
        {"vocabulary": "TMP/none.model"},
        {"vocabulary": "byte"},
    ],
)
def test_a_wrong_name_leaves_nothing_behind(tmp_path, fields):
    write(tmp_path / "text", 30)
    (tmp_path / "text" / "a.parquet").write_bytes(b"PAR1")
    in_folder = lambda value: tuple(map(in_folder, value)) if isinstance(value, tuple) else value.replace("TMP", folder)
    folder = str(tmp_path)
    data = of(tmp_path / "text", **{})
    data = DataConfig(**{**vars(data), **{field: in_folder(value) for field, value in fields.items()}})
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError):
        prepare(data, tmp_path / "run" / "data")
    assert sorted(tmp_path.rglob("*")) == before


# ---- any name, any locale -------------------------------------------------------------------------------------------


def test_pages_in_two_normal_forms_are_on_one_side(tmp_path):
    """RotorHazard/FPVTracksideCore#75: 81 of 200 pages were on different sides."""
    for form, language in (("NFC", "en"), ("NFD", "zh")):
        (tmp_path / language).mkdir()
        for i in range(200):
            name = unicodedata.normalize(form, f"página {i} ü é.txt")
            (tmp_path / language / name).write_text(f"page {i}")
    prepared = prepare(of(tmp_path / "en", tmp_path / "zh", split_by="path"), tmp_path / "data")
    tokens = [prepared.tokens(str(tmp_path / language), "validation").tolist() for language in ("en", "zh")]
    sides = [set(prepared.tokenizer.decode(ids).split("page ")) for ids in tokens]
    assert sides[0] == sides[1]
    assert len(sides[0]) > 20


@pytest.mark.parametrize("split_by", ["text", "path"])
def test_names_in_gbk_become_token_files(tmp_path, split_by, capsys):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + "/中文".encode("gbk")))
    folder.mkdir()
    for i in range(30):
        (folder / os.fsdecode(f"文件{i}.txt".encode("gbk"))).write_text(f"text {i}")
    (folder / os.fsdecode("说明".encode("gbk"))).write_text("left out")
    data = of(folder, split_by=split_by)
    prepared = prepare(data, tmp_path / "data")
    assert documents_of(prepared, str(folder)) == 30
    assert prepare(data, tmp_path / "data").meta == prepared.meta  # read again: the settings are the same
    config = tmp_path / "config.py"
    config.write_text(
        "import os\nfrom flmjax.config import *\ndef get_config():\n"
        f"    data = DataConfig(sources=(os.fsdecode({os.fsencode(folder)!r}),), vocabulary='bytes')\n"
        "    return to_config_dict(RunConfig(data=data, model=ModelConfig(max_length=16)))\n"
    )
    assert cli.main(["prepare", f"--config={config}", f"--workdir={tmp_path}/w", "--inspect=1"]) == 0
    (folder / os.fsdecode("坏.txt".encode("gbk"))).write_bytes(b"\xff")
    assert cli.main(["prepare", f"--config={config}", f"--workdir={tmp_path}/w2"]) == 2
    assert "not UTF-8 at byte 0" in capsys.readouterr().err


PREPARE = """
import sys, warnings
warnings.filterwarnings("error", category=EncodingWarning, module=r"flmjax\\.")
from flmjax.config import DataConfig
from flmjax.data import encode, prepare

if __name__ == "__main__":
    encode.PART_BYTES, encode.PROCESSES_FROM = (1000, 1000), 0
    folder, directory = sys.argv[1:]
    data = DataConfig(
        sources=(folder,), teachers=(f"{folder}/judged.jsonl",), vocabulary=None, vocab_size=310, workers=2,
        validation_fraction=0.2, split_by="path",
    )
    prepare.prepare(data, directory)
"""
LOCALES = {
    "utf8": {"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"},
    "c": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "latin1": {"LC_ALL": "en_US.ISO-8859-1", "PYTHONUTF8": "0"},
}


@pytest.fixture(scope="module")
def locales(tmp_path_factory) -> Path:
    """A folder of locales with ISO-8859-1."""
    folder = tmp_path_factory.mktemp("locales")
    line = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", folder / "en_US.ISO-8859-1"]
    try:
        subprocess.run(line, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine cannot make a locale of ISO-8859-1")
    return folder


@pytest.mark.parametrize(("first", "then"), [("utf8", "c"), ("c", "latin1"), ("latin1", "utf8")])
def test_data_of_one_locale_are_used_in_another(tmp_path, locales, first, then):
    """huggingface/diffusers#14819: text was read and written in the encoding of the locale."""
    folder = tmp_path / "文本 é"
    folder.mkdir()
    for i in range(60):
        (folder / f"文 é {i}.txt").write_text(f"文本 {i} é and some more of it", encoding="utf-8")
    rows = ({"proposition": f"{i} 是偶数吗？", "judgement": i % 2 == 0, "key": f"é {i}"} for i in range(60))
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "judged.jsonl").write_text(lines, encoding="utf-8")
    (folder / "texts").mkdir()
    for path in folder.glob("*.txt"):
        path.rename(folder / "texts" / path.name)
    (tmp_path / "prepare.py").write_text(PREPARE.replace("sources=(folder,)", "sources=(f'{folder}/texts',)"))

    def run(locale: str, directory: str) -> bytes:
        environment = {**os.environ, **LOCALES[locale], "LOCPATH": str(locales)}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
        line = [sys.executable, "-X", "warn_default_encoding", tmp_path / "prepare.py", folder, tmp_path / directory]
        result = subprocess.run(line, env=environment, capture_output=True, timeout=120)
        assert result.returncode == 0, result.stderr.decode()
        assert result.stderr == b"", result.stderr.decode()
        return (tmp_path / directory / "meta.json").read_bytes()

    meta = run(first, "data")
    assert run(then, "data") == meta
    assert run(then, "again") == meta
