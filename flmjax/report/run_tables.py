"""The tables of a run's page: stages, sources, certificates of growth, wall time, and the origin of every start."""

from typing import NamedTuple

from flmjax.config.sample_ranges import parse_ranges
from flmjax.data.prepared import short_names
from flmjax.report.page import finite, number, short
from flmjax.report.run_figure import has_teachers, train_lines
from flmjax.report.run_record import RunRecord, latest
from flmjax.text_table import duration
from flmjax.workdir.metrics import Record


class Table(NamedTuple):
    """Column heads, and rows of as many cells."""

    head: list[str]
    rows: list[list[str]]


def judgements(validation: Record) -> tuple[str, str]:
    """(accuracy, number) of the judgements of a line of validation."""
    return number(validation.get("judgement_accuracy"), ".1%"), number(validation.get("judged"), ",")


def stage_table(run: RunRecord) -> Table:
    """Sizes, tokens, FLOPs and last losses of the stages that have begun."""
    head = "stage,layers,embed,heads,MLP,parameters,steps,batch,tokens,FLOPs,train loss,val. loss,val. bits/byte"
    head += ",val. teacher loss,val. judgements" if has_teachers(run) else ""
    losses = train_lines(run, "loss")
    rows = []
    for record in run.stages:
        stage, model = record.stage, record.stage.model
        train = latest([line for line in losses if line["stage"] == stage.name])
        steps, tokens, flops = (record.last[key] - record.before[key] for key in ("step", "tokens", "flops"))
        row = [stage.name, *(str(size) for size in (model.num_layers, model.embed_dim, model.num_heads, model.mlp_dim))]
        row[3] += f" ({model.kv_heads} kv)" if model.kv_heads != model.num_heads else ""
        row += [
            number(record.parameters, ","),
            f"{steps:,}" + (f" of {stage.config.steps:,}" if steps < stage.config.steps else ""),
        ]
        row += [f"{stage.config.batch_size} x {model.max_length}", f"{tokens:,}", short(flops, "FLOP")]
        row += [number(x) for x in (train.get("loss"), *map(record.validation.get, ("loss", "bits_per_byte")))]
        if has_teachers(run):
            accuracy, judged = judgements(record.validation)
            row += [number(record.validation.get("teacher_loss")), f"{accuracy} of {judged}"]
        rows.append(row)
    return Table(head.split(","), rows)


def validation_table(run: RunRecord) -> Table:
    """The last validation of every stage by source, and by teacher; empty for a run with one of either kind."""
    metrics = ("loss", "bits_per_byte", "judgement_accuracy")
    rows = []
    for record in run.stages:
        labels = dict.fromkeys(key.split("/", 1)[1] for key in record.validation if "/" in key)
        for label in labels:
            loss, bits, accuracy = (record.validation.get(f"{metric}/{label}") for metric in metrics)
            rows.append([label, record.stage.name, number(loss), number(bits), number(accuracy, ".1%")])
    return Table(["source", "stage", "val. loss", "val. bits/byte", "val. judgements"], rows)


def certificate_table(run: RunRecord) -> Table:
    """The certificates, and a row for each growth that lacks one."""
    head = "growth,step,result,float32,float64,run,own rounding (run),rms (run),largest at (run),tolerance (float32),"
    head += "max |logit|,loss,KL,gradient norm,compared,family,sizes"
    rows = [_certificate_row(certificate) for certificate in run.certificates]
    certified = {certificate.get("step") for certificate in run.certificates}
    for line in run.growth:
        if line["step"] not in certified:
            change = f"{line.get('from_stage')} → {line['stage']}"
            rows.append([change, f"{line['step']}", "✗ no certificate", *["-"] * 14])
    return Table(head.split(","), rows)


def _certificate_row(c: Record) -> list[str]:
    difference, rms, own, row = (
        c.get(name) or {} for name in ("max_difference", "rms_difference", "rounding", "row")
    )  # certificates of older versions have the first alone
    sequence, token = row.get("run") or (None, None)
    norms = c.get("gradient_norm") or (None, None)
    return [
        f"{c.get('from_stage')} → {c.get('to_stage')}",
        f"{c.get('step')}",
        _verdict(c),
        number(difference.get("float32"), ".1e"),
        number(difference.get("float64"), ".1e"),
        f"{number(difference.get('run'), '.1e')} ({c.get('run_dtype')})",
        number(own.get("run"), ".1e"),
        number(rms.get("run"), ".1e"),
        "-" if token is None else f"sequence {sequence}, token {token}",
        number(c.get("tolerance"), ".0e"),
        number(c.get("max_logit"), ".2f"),
        " → ".join(dict.fromkeys(number(c.get(name), ".4f") for name in ("loss_before", "loss_after"))),
        number(c.get("kl"), ".1e"),
        " → ".join(dict.fromkeys(number(norm, ".3g") for norm in norms)),
        f"{c.get('rows')} sequences, {number(c.get('tokens'), ',')} tokens",
        f"{c.get('family')}",
        ", ".join(f"{name} {a} → {b}" for name, (a, b) in (c.get("sizes") or {}).items()),
    ]


def _verdict(certificate: Record) -> str:
    if certificate.get("failure"):
        return "✗ failed"
    if not certificate.get("exact"):
        return f"{certificate.get('claim') or 'not exact'}, by design"
    difference, tolerance = (certificate.get("max_difference") or {}).get("float32"), certificate.get("tolerance")
    return "✓ exact" if finite(difference) <= finite(tolerance) else "✗ not shown exact"  # NaN is not <= anything


def mixture_table(run: RunRecord) -> Table:
    """Tokens of every source, its share of the samples of each stage, and its epochs; empty without prepared data."""
    stages = run.config.schedule
    head = ["source", "training tokens", *(f"share in {stage.name}" for stage in stages), "epochs so far"]
    mixture = run.mixture
    if mixture is None:
        return Table(head, [])
    rows = []
    for i, label in enumerate(short_names(tuple(mixture.tokens))):
        shares = (number(of_stage[i], ".1%") for of_stage in mixture.shares)
        epochs = None if mixture.epochs is None else mixture.epochs[i]
        rows.append([label, f"{list(mixture.tokens.values())[i]:,}", *shares, number(epochs, ".2f")])
    return Table(head, rows)


def roll_back_table(run: RunRecord) -> Table:
    """Roll-backs and the samples that each leaves out, and the samples that a setting leaves out."""
    rows = [
        [
            f"{record.from_step:,}",
            record.reason,
            number(record.loss),
            f"{record.to_step:,}",
            f"{record.first_sample:,} to {record.end_sample - 1:,}",
            f"{record.end_sample - record.first_sample:,}",
        ]
        for record in run.roll_backs
    ]
    for first, end in parse_ranges(run.config.data.skip_samples, "data.skip_samples"):
        rows.append(["-", "data.skip_samples", "-", "-", f"{first:,} to {end - 1:,}", f"{end - first:,}"])
    return Table(["update", "reason", "loss", "back to step", "samples left out", "number"], rows)


def wall_time_table(run: RunRecord) -> Table:
    """Wall time of all starts by kind of work, longest first; empty for a run of a version that did not measure it."""
    seconds = run.seconds
    total = sum(seconds.values())
    if not total:
        return Table([], [])
    works = sorted((work for work in seconds if seconds[work]), key=lambda work: -seconds[work])
    rows = [[work, duration(seconds[work]), f"{seconds[work] / total:.1%}"] for work in works]
    return Table(["work", "time", "share"], [*rows, ["all", duration(total), "100.0%"]])


def start_table(run: RunRecord) -> Table:
    """The origin of every start: date, steps, devices, versions, commit and command line."""
    rows = []
    for start in run.starts:
        commit = f"{start.get('commit') or '-'}"[:12] + (", with changes" if start.get("is_dirty") else "")
        versions = ", ".join(f"{name} {version}" for name, version in (start.get("versions") or {}).items())
        command = f"{start.get('command') or '-'}\nin {start.get('folder') or '-'}"
        steps = f"{number(start.get('first_step'), ',')} to {number(start.get('last_step'), ',')}"
        devices = f"{number(start.get('devices'), ',')} x {start.get('device') or '-'}"
        rows.append([f"{start.get('date') or '-'}".replace("T", " "), steps, devices, versions, commit, command])
    return Table(["date", "steps", "devices", "versions", "commit", "command line"], rows)
