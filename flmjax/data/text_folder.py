"""A folder of text files as a TFDS dataset, for seqio.TfdsDataSource and Grain.

    tfds build flmjax/data/text_folder.py --manual_dir=FOLDER --data_dir=DIRECTORY --file_format=array_record

or, from Python, `build(FOLDER, DIRECTORY)`.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from flmjax.config import ConfigError
from flmjax.data.corpus import text_files

SPLITS = ("train", "validation")


class TextFolder(tfds.core.GeneratorBasedBuilder):
    """Documents of the text files in manual_dir, found and parted as those of `data.sources` (corpus/text_files.py).

    Features: `text`, and `id`: the file's path within the folder, "#" and the document's number in the file. The order
    is that of the files. Folders `train` and, perhaps, `validation` are splits; without them all is `train`.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # nothing to find beside the code; TFDS 4.9.10 looks with a package that it does not require
    MANUAL_DOWNLOAD_INSTRUCTIONS = "manual_dir is the folder of text files, or holds folders `train` and `validation`."

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "id": tfds.features.Text()})
        return tfds.core.DatasetInfo(
            builder=self, description="Text files of a folder.", features=features, disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        folder = Path(dl_manager.manual_dir)
        files = text_files.find(os.fspath(folder), (), "manual_dir")
        splits = [split for split in SPLITS if (folder / split).is_dir()]
        if not splits:
            return {"train": self._generate_examples(files)}
        parted: dict[str, list[Path]] = {split: [] for split in splits}
        for path in files.paths:
            split = path.relative_to(folder).parts[0]
            if split not in splits:
                raise ConfigError(f"manual_dir: {path} is of no split; move it into {folder / splits[0]}")
            parted[split].append(path)
        if not parted.get("train"):
            raise ConfigError(f"manual_dir: {folder} has a folder 'validation', but no text in 'train'")
        return {split: self._generate_examples(text_files.Files(p, folder)) for split, p in parted.items()}

    def _generate_examples(self, files: text_files.Files) -> Iterator[tuple[str, dict[str, str]]]:
        for path in files.paths:
            one_file = text_files.Files([path], files.root)
            for i, document in enumerate(text_files.documents(one_file)):
                name = f"{path.relative_to(files.root)}#{i}"
                yield name, {"text": document.text, "id": name}


def build(folder: str | os.PathLike[str], data_dir: str | os.PathLike[str]) -> TextFolder:
    """Prepare `folder` as ArrayRecord in `data_dir`, anew if something was there, and return the builder.

    `builder.as_data_source("train")` is a source for Grain; seqio reads
    TfdsDataSource("text_folder:1.0.0", tfds_data_dir=data_dir).

    Raises:
        ConfigError: for a folder without text files, or with files beside its splits.
    """
    builder = TextFolder(data_dir=os.fspath(data_dir), file_format="array_record")
    config = tfds.download.DownloadConfig(
        manual_dir=os.path.abspath(folder), download_mode=tfds.GenerateMode.REUSE_CACHE_IF_EXISTS
    )
    builder.download_and_prepare(download_config=config)
    return builder
