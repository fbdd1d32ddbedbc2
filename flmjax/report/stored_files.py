"""Files of a run as its report reads them: entries that are absent or of another type are refused by name."""

import json
from pathlib import Path

from flmjax.config import ConfigError, stored_entry
from flmjax.data.prepared import META_FILE, check_sources
from flmjax.workdir.metrics import Record

TEXTS = ("kind", "stage", "from_stage", "prompt", "text")  # of a line of metrics; other values are numbers or null


def checked_lines(lines: list[Record], path: Path) -> list[Record]:
    """The lines of metrics.jsonl, each checked to have the entries of its kind.

    Args:
        path: of the file, for messages.

    Raises:
        ConfigError: naming the file, the line's kind and step, and the entry.
    """
    for line in lines:
        name = f"{path}: the {line['kind']} line of step {line['step']}"
        if line["kind"] not in ("train", "validation", "growth", "sample"):
            continue
        stored_entry(line, "stage", str, name)
        if line["kind"] != "sample":
            stored_entry(line, "tokens", float, name)
            stored_entry(line, "flops", float, name)
        _check_values(line, name)
    return lines


def _check_values(line: Record, name: str) -> None:
    for key, value in line.items():
        if value is not None and not isinstance(value, bool):
            stored_entry(line, key, str if key in TEXTS else float, name)


def read_certificates(workdir: Path) -> list[Record]:
    """The certificates of the growths of a run, in order.

    Raises:
        ConfigError: naming the file, and the entry that is of another type.
    """
    certificates = []
    for path in sorted((workdir / "certificates").glob("step_*.json")):
        certificate = _read_json(path)
        stored_entry(certificate, "step", int, str(path))
        for name in ("max_difference", "rms_difference", "rounding", "row"):
            if certificate.get(name) is not None:
                stored_entry(certificate, name, dict, str(path))
        sizes = stored_entry(certificate, "sizes", dict, str(path)) if certificate.get("sizes") is not None else {}
        pairs = {f"sizes.{name}": pair for name, pair in sizes.items()}
        pairs |= {name: pair for name in ("gradient_norm", "parameters") if (pair := certificate.get(name)) is not None}
        pairs |= {f"row.{name}": pair for name, pair in (certificate.get("row") or {}).items() if pair is not None}
        _check_pairs(pairs, str(path))
        certificates.append(certificate)
    return certificates


def _check_pairs(pairs: Record, name: str) -> None:
    for key in pairs:
        if len(stored_entry(pairs, key, list, name)) != 2:
            raise ConfigError(f"{name} has {key}={pairs[key]}, not a pair")


def read_description(folder: Path) -> Record:
    """The description of the prepared data in `folder`; {} without meta.json.

    Raises:
        ConfigError: naming meta.json, and the entry that is of another type.
    """
    path = folder / META_FILE
    if not path.exists():
        return {}
    meta = _read_json(path)
    if "tokenizer" in meta:
        stored_entry(stored_entry(meta, "tokenizer", dict, str(path)), "vocab_size", int, f"{path}: tokenizer")
    if "sources" in meta:
        check_sources(stored_entry(meta, "sources", dict, str(path)), path)
    return meta


def _read_json(path: Path) -> Record:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(stored, dict):
        raise ConfigError(f"{path} is no JSON object")
    return stored
