"""A folder of text files as a TFDS dataset."""

import lzma

import grain
import pytest

pytest.importorskip("tensorflow_datasets")

import seqio
import tensorflow_datasets as tfds

from flmjax.config import ConfigError, DataConfig
from flmjax.data.sources import files, seqio_mixture, seqio_tasks, text_files, tfds_folder

FILES = {
    "b.txt": "First\ntext\n\n\n第二篇\n",
    "en/a.md": "# Third\n\n\nstill",
    "en/c.docs.txt": "four\n\nfive",
    "rows.jsonl": '{"text": "six", "key": "k"}\n{"text": "seven"}\n',
}


def write(folder, files=FILES):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def split(folder):
    """FILES as training text, one compressed document held out."""
    write(folder / "train")
    (folder / "validation").mkdir()
    (folder / "validation/held.txt.xz").write_bytes(lzma.compress(b"held out"))
    return folder


def decoded(elements):
    return [{name: value.decode() for name, value in element.items()} for element in elements]


def test_seqio_and_grain_read_the_documents_of_text_files(tmp_path):
    folder = write(tmp_path / "text")
    builder = tfds_folder.build(folder, tmp_path / "data")
    expected = list(text_files.documents(files.find(str(folder), ())))
    assert list(builder.info.splits) == ["train"]
    by_grain = decoded(grain.MapDataset.source(builder.as_data_source("train")))
    assert [(row["text"], row["key"]) for row in by_grain] == [(d.text, d.key or "") for d in expected]
    assert [row["id"] for row in by_grain][:3] == ["b.txt#0", "b.txt#1", "en/a.md#0"]
    source = seqio.TfdsDataSource("text_folder:1.0.0", tfds_data_dir=str(tmp_path / "data"))
    by_seqio = decoded(source.get_dataset("train", shuffle=False).as_numpy_iterator())
    assert by_seqio == by_grain
    assert source.num_input_examples("train") == len(expected) == 7
    later = tfds.builder_from_directory(tmp_path / "data/text_folder/1.0.0")
    assert decoded(later.as_data_source("train")) == by_grain


def test_folders_train_and_validation_are_splits_of_a_task(tmp_path, monkeypatch):
    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
        monkeypatch.setattr(registry, "_REGISTRY", {})
    tfds_folder.build(split(tmp_path / "text"), tmp_path / "data")
    source = seqio.TfdsDataSource("text_folder:1.0.0", tfds_data_dir=str(tmp_path / "data"))
    seqio_tasks.add_text_task("folder", source)
    (read,) = seqio_mixture.read_mixture(DataConfig(mixture="folder")).sources
    expected = text_files.documents(files.find(str(tmp_path / "text/train"), ()))
    assert [d for d in read.read() if d.split == "train"] == [d._replace(split="train") for d in expected]
    assert [d.text for d in read.read() if d.split == "validation"] == ["held out"]


def test_building_again_reads_the_files_again(tmp_path):
    folder = write(tmp_path / "text", {"a.txt": "old"})
    tfds_folder.build(folder, tmp_path / "data")
    builder = tfds_folder.build(write(folder, {"a.txt": "new"}), tmp_path / "data")
    assert [row["text"] for row in decoded(builder.as_data_source("train"))] == ["new"]


def test_folders_without_text_or_with_stray_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no file or folder"):
        tfds_folder.build(tmp_path / "nowhere", tmp_path / "data")
    folder = write(split(tmp_path / "text"), {"loose.txt": "of no split"})
    with pytest.raises(ConfigError, match=r"loose\.txt is of no split"):
        tfds_folder.build(folder, tmp_path / "data")
    held = write(tmp_path / "held", {"validation/a.txt": "held out"})
    with pytest.raises(ConfigError, match="no text in 'train'"):
        tfds_folder.build(held, tmp_path / "data")
