"""Invented runs whose numbers are known by hand, and their pages as a reader sees them."""

import dataclasses
import json
import math
import random
from html.parser import HTMLParser
from pathlib import Path

from flmjax.config import (
    DataConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
    to_stored,
)
from flmjax.model.flops import flops_per_token
from flmjax.report.run_page import run_page, write_report
from flmjax.report.run_record import read_run

MODEL = ModelConfig(num_layers=1, embed_dim=4, num_heads=1, head_dim=2, mlp_dim=8, max_length=16, vocab_multiple=1)
STAGES = (
    StageConfig(name="small", steps=4, batch_size=2),
    StageConfig(name="large", steps=2, batch_size=2, embed_dim=8, mlp_dim=16),
)
VOCAB = 10
# Parameters of small: embedding 10 x 4 = 40; in the layer Q, K, V 3 (4 x 2 + 2), output 2 x 4 + 4,
# MLP 4 x 8 + 8 + 8 x 4 + 4, two norms 2 x 8; final norm 8. 40 + 30 + 12 + 76 + 16 + 8 = 182.
# Large: 80 + 3 (8 x 2 + 2) + (2 x 8 + 8) + (8 x 16 + 16 + 16 x 8 + 8) + 32 + 16 = 80 + 54 + 24 + 280 + 48 = 486.
# FLOPs per token of small: 6 (32 + 64 + 40) + 6 x 1 x 2 x 16 = 816 + 192 = 1008; large: 6 (64 + 256 + 80) + 192 = 2592.
# Tokens: 4 x 2 x 16 = 128, then 64 more: 192. FLOPs: 128 x 1008 = 129,024; + 64 x 2592 = 165,888: 294,912.
# All on large: 192 x 2592 = 497,664; 294,912 / 497,664 = 0.5926: 40.7 % fewer.


def make_workdir(
    workdir: Path,
    model: ModelConfig = MODEL,
    stages: tuple[StageConfig, ...] = STAGES,
    vocab_size: int = VOCAB,
    until: int | None = None,
    log_every: int = 1,
    tokens_per_second: float = 64.0,
) -> RunConfig:
    """Write the workdir of a run up to step `until`; losses fall from ln(vocab) by a power law."""
    config = RunConfig(model=model, stages=stages, data=DataConfig(vocabulary="bytes"))
    (workdir / "data").mkdir(parents=True)
    (workdir / "certificates").mkdir()
    (workdir / "config.json").write_text(json.dumps(to_stored(config)))
    meta = {"tokenizer": {"vocab_size": vocab_size}, "validation_gzip_bits_per_byte": 2.5}
    (workdir / "data" / "meta.json").write_text(json.dumps(meta))
    noise, lines, step, tokens, flops, loss = random.Random(0), [], 0, 0, 0.0, math.log(vocab_size)
    known = dataclasses.replace(config, model=dataclasses.replace(model, vocab_size=vocab_size))
    for stage in known.schedule:
        settings, previous = stage.config, stage.previous
        if previous is not None and (until is None or step < until):
            growth = {"stage": stage.name, "from_stage": previous.name, "tokens": tokens, "flops": flops}
            lines.append({"kind": "growth", "step": step, **growth, "seconds": 1.5})
            certificate = make_certificate(step, previous.name, stage.name, previous.model, stage.model, loss)
            (workdir / "certificates" / f"step_{step:08d}.json").write_text(json.dumps(certificate))
        for s in range(settings.steps):
            if step == until:
                break
            step += 1
            tokens += settings.batch_size * model.max_length
            flops += settings.batch_size * model.max_length * flops_per_token(stage.model, model.max_length)
            loss = 0.3 * math.log(vocab_size) * (1 + (1 + step / 8) ** -0.35 * 2.3 * (1 - 0.08 * stage.index))
            cosine = 0.55 + 0.45 * math.cos(math.pi * s / settings.steps)
            common = {"stage": stage.name, "tokens": tokens, "flops": flops}
            if step % log_every == 0:
                train = loss + noise.gauss(0, 0.06)
                values = {"loss": train, "bits_per_byte": train / 2.1, "gradient_norm": 0.8}
                values["learning_rate"] = settings.schedule_settings.learning_rate * min(1, (s + 1) / 20) * cosine
                speed = {"tokens_per_second": tokens_per_second / (stage.index + 1), "model_flops_utilization": 0.3}
                lines.append({"kind": "train", "step": step, **common, **values, **speed, "skipped_updates": 0})
            if s + 1 == settings.steps or step % (10 * log_every) == 0:
                lines.append({"kind": "validation", "step": step, **common, "loss": loss, "bits_per_byte": loss / 2.1})
        text = "The <b>bold</b> claim & a \x00 byte\nof stage " + stage.name
        lines.append({"kind": "sample", "step": step, "stage": stage.name, "prompt": "The ", "text": text})
        if step == until:
            break
    write_lines(workdir, lines)
    return config


def make_certificate(step: int, old: str, new: str, small: ModelConfig, large: ModelConfig, loss: float) -> dict:
    sizes = {f: [getattr(small, f), getattr(large, f)] for f in ("num_layers", "embed_dim", "mlp_dim", "num_heads")}
    sizes = {name: pair for name, pair in sizes.items() if pair[0] != pair[1]}
    certificate = {"step": step, "from_stage": old, "to_stage": new, "family": "zero", "exact": True, "sizes": sizes}
    certificate |= {"max_difference": {"run": 1.2e-06, "float32": 1.2e-06, "float64": 3.1e-15}, "max_logit": 11.25}
    certificate |= {"run_dtype": "float32", "loss_before": loss, "loss_after": loss, "rows": 4, "tokens": 1024}
    certificate |= {"kl": 2.5e-9, "gradient_norm": [1.25, 1.5], "claim": "exact", "mask_removed": None}
    certificate |= {"rms_difference": {"run": 2.5e-07, "float32": 2.5e-07, "float64": 6e-16}, "row": {"run": [3, 17]}}
    certificate |= {"rounding": {"run": 1.25e-05, "float32": 1.25e-05, "float64": 3.1e-15}, "roundings": 8.0}
    return {**certificate, "parameters": [182, 486], "tolerance": 1e-4}


def write_lines(workdir: Path, lines: list[dict]) -> None:
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


class Page(HTMLParser):
    """The page's tables as {first cell: {column: cell}}, its text, the addresses it refers to and its open tags."""

    VOID = ("meta", "img", "source")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        self.words.append(" ")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.words.append(" ")

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if "style" not in self.open:
            self.words.append(data)

    def table(self, i: int) -> dict[str, dict[str, str]]:
        head, *rows = self.tables[i]
        return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def report(workdir: Path, draw: bool = False) -> Page:
    """The page, without its pictures unless `draw`: each costs a second."""
    if draw:
        return Page(write_report(workdir))
    page = workdir / "report.html"
    page.write_text(run_page(read_run(workdir), workdir.name, b"", b""), encoding="utf-8")
    return Page(page)


def change(workdir: Path, kind: str, **values: object) -> None:
    write_lines(workdir, [{**line, **(values if line["kind"] == kind else {})} for line in read_lines(workdir)])


def make_teacher_workdir(workdir: Path, alternating: bool = False, **kwargs: object) -> None:
    """make_workdir with teachers: the loss of the marks falls, the accuracy of judgements rises from chance.

    Where batches alternate, an odd step has teachers alone and an even one text alone.
    """
    make_workdir(workdir, **kwargs)
    lines, noise = read_lines(workdir), random.Random(1)
    last = max(line["step"] for line in lines)
    for line in lines:
        if line["kind"] not in ("train", "validation"):
            continue
        right = 0.5 + 0.4 * (1 - math.exp(-4 * line["step"] / last))
        spread = 0.04 if line["kind"] == "train" else 0.01
        line["judgement_accuracy"] = min(1.0, right + noise.gauss(0, spread))
        line["teacher_loss"] = 1.2 * (1 - right) + noise.gauss(0, spread / 4)
        if line["kind"] == "validation":
            line["judged"] = 1512
            continue
        line["language_loss"], line["loss"] = line["loss"], 0.8 * line["loss"] + 0.2 * line["teacher_loss"]
        if alternating and line["step"] % 2:
            line |= {"loss": line["teacher_loss"], "language_loss": None, "bits_per_byte": None}
        elif alternating:
            line |= {"loss": line["language_loss"], "teacher_loss": None, "judgement_accuracy": None}
    write_lines(workdir, lines)
