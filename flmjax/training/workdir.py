"""The folder of a run: whose it is, and where its data are."""

import dataclasses
import json
from pathlib import Path

from flmjax.config import ConfigError, RunConfig, differences, to_json
from flmjax.data.prepared import Prepared


def data_directory(config: RunConfig, workdir: Path) -> Path:
    """Where the run's token files are."""
    return Path(config.data.directory) if config.data.directory else workdir / "data"


def with_vocabulary(config: RunConfig, data: Prepared) -> RunConfig:
    """Fill in model.vocab_size from the tokenizer, or check it against that."""
    if config.model.vocab_size not in (None, data.vocab_size):
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} but the data's vocabulary has {data.vocab_size} ids; "
            "leave it None to take the tokenizer's"
        )
    if data.marks is not None and config.model.attention == "cudnn":  # of a mixture, known only now
        raise ConfigError(
            f"model.attention='cudnn' cannot keep a row's propositions apart, and {data.directory} has teachers; take "
            "'plain'"
        )
    return dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=data.vocab_size))


def claim_workdir(config: RunConfig, workdir: Path) -> None:
    """Store the config in a new workdir; refuse one that holds a run of another config, naming the fields."""
    path = workdir / "config.json"
    if path.is_file():
        changed = differences(json.loads(path.read_text()), json.loads(json.dumps(to_json(config))))
        if changed:
            raise ConfigError(f"{workdir} holds a run of another config: {'; '.join(changed)}; take another --workdir")
    else:
        if (workdir / "checkpoints").exists():
            raise ConfigError(f"{workdir} has checkpoints but no config.json: no workdir, or growth that was cut off")
        write_config(config, workdir)


def write_config(config: RunConfig, workdir: Path) -> None:
    """Make `workdir` the workdir of `config`."""
    workdir.mkdir(parents=True, exist_ok=True)
    partial = workdir / "config.tmp"
    partial.write_text(json.dumps(to_json(config), indent=1) + "\n")
    partial.replace(workdir / "config.json")
