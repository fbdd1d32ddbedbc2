"""A folder of text files as a TFDS data set: `build(FOLDER, DIRECTORY)` for seqio and Grain. For Grain alone:

    tfds build flmjax/data/sources/tfds_folder.py --manual_dir=FOLDER --data_dir=DIRECTORY --file_format=array_record

This command needs, in TFDS 4.9.10, the packages apache-beam, mlcroissant and importlib_resources.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from flmjax.config import ConfigError
from flmjax.data.sources.files import Files, find, report_left_out
from flmjax.data.sources.text_files import documents

SPLITS = ("train", "validation")


class TextFolder(tfds.core.GeneratorBasedBuilder):
    """Documents of the text files in manual_dir, divided into documents as `data.sources` divides them (text_files.py).

    The features are `text`; `id`, which is the file's path within the folder, "#" and the document's number in the
    file; and `key`, empty but for JSON lines that have a key. The order is that of the files. The folders `train` and
    `validation` (optional) become splits; without such folders all documents are in `train`.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # TFDS 4.9.10 would look for files beside the code with a package that it does not require
    MANUAL_DOWNLOAD_INSTRUCTIONS = "manual_dir is the folder of text files, or holds folders `train` and `validation`."

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in ("text", "id", "key")})
        return tfds.core.DatasetInfo(
            builder=self, description="Text files of a folder.", features=features, disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        folder = Path(dl_manager.manual_dir)
        files = find(os.fspath(folder), (), "manual_dir")
        splits = [split for split in SPLITS if (folder / split).is_dir()]
        if not splits:
            return {"train": self._generate_examples(files)}
        paths: dict[str, list[Path]] = {split: [] for split in splits}
        for path in files.paths:
            split = path.relative_to(folder).parts[0]
            if split not in splits:
                raise ConfigError(f"manual_dir: {path} is of no split; move it into {folder / splits[0]}")
            paths[split].append(path)
        if not paths.get("train"):
            raise ConfigError(f"manual_dir: {folder} has a folder 'validation', but no text in 'train'")
        return {split: self._generate_examples(Files(paths[split], folder)) for split in splits}

    def _generate_examples(self, files: Files) -> Iterator[tuple[str, dict[str, str]]]:
        for path in files.paths:
            one_file = Files([path], files.root)
            for i, document in enumerate(documents(one_file)):
                relative = os.fsencode(path.relative_to(files.root)).decode("utf-8", "backslashreplace")
                name = f"{relative}#{i}"
                yield name, {"text": document.text, "id": name, "key": document.key or ""}


def build(folder: str | os.PathLike[str], data_dir: str | os.PathLike[str]) -> TextFolder:
    """Prepare `folder` in `data_dir`, replacing an earlier preparation, and return the builder.

    The data set is written in two formats: ArrayRecord, which Grain reads by `as_data_source`, and TFRecord for seqio's
    TfdsDataSource("text_folder:1.0.0", tfds_data_dir=data_dir), which cannot read ArrayRecord. Later,
    tfds.builder_from_directory(f"{data_dir}/text_folder/1.0.0") returns a builder of both formats.

    Raises:
        ConfigError: for a folder without text files, or with files beside the folders of its splits.
    """
    report_left_out("folder", os.fspath(folder), find(os.fspath(folder), (), "folder"))
    root = Path(data_dir)
    config = tfds.download.DownloadConfig(manual_dir=os.path.abspath(folder))
    shutil.rmtree(root / TextFolder.name / str(TextFolder.VERSION), ignore_errors=True)
    builder = TextFolder(data_dir=root)
    builder.download_and_prepare(download_config=config)
    with tempfile.TemporaryDirectory(dir=root) as temporary:
        random_access = TextFolder(data_dir=temporary, file_format="array_record")
        random_access.download_and_prepare(download_config=config)
        for path in Path(random_access.data_dir).glob("*.array_record*"):  # as many shards: the bytes are the same
            path.rename(Path(builder.data_dir) / path.name)
    builder.info.add_alternative_file_format("array_record")
    builder.info.write_to_directory(builder.data_dir)
    return builder
