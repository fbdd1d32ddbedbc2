"""FLOPs by hand, metrics that survive interruptions, and progress on a terminal."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from flmjax.config import ConfigError, ModelConfig
from flmjax.hardware import peak_flops
from flmjax.model.flops import flops_per_token, matmul_parameters
from flmjax.model.transformer import abstract_params
from flmjax.sharding.axes import map_with_axes
from flmjax.workdir.metrics import MetricsWriter, read_metrics
from flmjax.workdir.paths import remove_certificates
from flmjax.workdir.progress import ProgressBar

TINY = ModelConfig(num_layers=2, embed_dim=6, num_heads=4, num_kv_heads=2, head_dim=3, mlp_dim=5, vocab_size=11)


def test_flops_per_token_equal_the_count_by_hand():
    # Q and output 2 (6 x 12) = 144, K and V 2 (6 x 6) = 72, MLP 2 (6 x 5) = 60; two layers: 552; head 6 x 11 = 66.
    assert matmul_parameters(TINY) == 618
    # Scores and weighted sum of row r (r = 1 to 10 keys, half of the square: 5 in the mean): 2 x 2 x 5 x 4 x 3 = 240
    # forward, 480 in two layers, 1440 with backward.
    assert flops_per_token(TINY, length=10) == 6 * 618 + 1440


def test_a_swiglu_mlp_has_three_matrices():
    assert matmul_parameters(dataclasses.replace(TINY, activation="swiglu")) == 618 + 2 * 6 * 5


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("position", ["xpos", "learned"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_matmul_parameters_are_those_of_the_leaves_that_read(tied, position, activation):
    config = ModelConfig(
        num_layers=3,
        embed_dim=10,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        mlp_dim=14,
        vocab_size=11,
        vocab_multiple=1,
        tied_embedding=tied,
        position=position,
        activation=activation,
    )
    params, axes = abstract_params(config)
    sizes = map_with_axes(lambda _, leaf_axes, leaf: leaf.size if "read" in leaf_axes.roles else 0, axes, params)
    head = 11 * 10 if tied else 0  # tied, the head is the embedding's leaf, whose role is to be looked up
    assert matmul_parameters(config) == sum(jax.tree.leaves(sizes)) + head


def test_padded_rows_of_the_vocabulary_are_not_counted():
    assert matmul_parameters(dataclasses.replace(TINY, vocab_multiple=64)) == 618


def test_flops_without_a_vocabulary_name_the_field():
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        matmul_parameters(ModelConfig())


@pytest.mark.parametrize(
    ("kind", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312e12),
        ("NVIDIA A800-SXM4-80GB", "float32", 156e12),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("TPU v4", "bfloat16", 275e12),
        ("TPU v5 lite", "bfloat16", 197e12),
        ("TPU v5p", "bfloat16", 459e12),
        ("TPU v6 lite", "bfloat16", 918e12),
    ],
)
def test_peaks_of_known_devices_come_from_the_table(kind, dtype, peak):
    number, source = peak_flops(SimpleNamespace(device_kind=kind), dtype)
    assert number == peak
    assert "data sheet" in source
    assert dtype in source


def test_the_peak_of_another_device_is_measured():
    number, source = peak_flops(jax.devices()[0], "float32")
    x = np.ones((512, 512), np.float32)
    start = time.perf_counter()
    for _ in range(20):
        x @ x
    numpy_rate = 20 * 2 * 512**3 / (time.perf_counter() - start)
    assert numpy_rate / 20 < number < numpy_rate * 20
    assert source.startswith("measured on this machine")
    assert "a busy machine measures less" in source


# ---- metrics.jsonl --------------------------------------------------------------------------------------------------


def train(workdir: Path, start: int, stop: int, value: float = 0.0) -> None:
    with MetricsWriter(workdir, resume_step=start) as writer:
        for step in range(start + 1, stop + 1):
            writer.write("train", step, loss=value)
            if step % 2 == 0:
                writer.write("validation", step, loss=value)


def lines_of(workdir: Path) -> list[tuple[str, int, float]]:
    return [(r["kind"], r["step"], r["loss"]) for r in read_metrics(workdir)]


def test_a_resumed_run_leaves_one_line_per_kind_and_step(tmp_path):
    train(tmp_path, 0, 5, value=1.0)
    train(tmp_path, 2, 4, value=2.0)
    expected = [("train", 1, 1.0), ("train", 2, 1.0), ("validation", 2, 1.0)]
    assert lines_of(tmp_path) == [*expected, ("train", 3, 2.0), ("train", 4, 2.0), ("validation", 4, 2.0)]


def test_a_repeated_line_at_the_resumed_step_is_not_written(tmp_path):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.write("train", 3, loss=1.0)
        writer.write("growth", 3, loss=1.0)  # the kill: the checkpoint of step 3 has the model before growth
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        writer.write("growth", 3, loss=1.0)
        writer.write("validation", 3, loss=1.0)  # had not been reached
        writer.write("train", 4, loss=1.0)
    assert [line[:2] for line in lines_of(tmp_path)] == [("train", 3), ("growth", 3), ("validation", 3), ("train", 4)]


def test_a_growth_that_is_to_be_done_again_leaves_no_line_and_no_certificate(tmp_path):
    """The process died after the growth at step 3, and the stage before it is longer now: the report showed both."""
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.write("validation", 3, loss=1.0)
        writer.write("growth", 3, loss=1.0)
    (tmp_path / "certificates").mkdir()
    for step in (0, 2, 3):
        (tmp_path / "certificates" / f"step_{step:08d}.json").write_text("{}")
    MetricsWriter(tmp_path, resume_step=3).close()
    remove_certificates(tmp_path, 3)
    assert [line[:2] for line in lines_of(tmp_path)] == [("validation", 3)]
    assert sorted(path.name for path in (tmp_path / "certificates").iterdir()) == [
        "step_00000000.json",  # of `flmjax grow`
        "step_00000002.json",
    ]
    remove_certificates(tmp_path, 0)
    assert [path.name for path in (tmp_path / "certificates").iterdir()] == ["step_00000000.json"]


@pytest.mark.parametrize("cut", [1, 5, 25])
def test_an_incomplete_line_is_skipped_and_removed_on_opening(tmp_path, cut):
    train(tmp_path, 0, 1)
    path = tmp_path / "metrics.jsonl"
    complete = path.read_bytes()
    path.write_bytes(complete + b'{"kind": "train", "step": 1, "loss": 1}'[:cut])
    assert lines_of(tmp_path) == [("train", 1, 0.0)]
    MetricsWriter(tmp_path, resume_step=1).close()
    assert path.read_bytes() == complete


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    train(tmp_path, 0, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step": 2, ', b"", 1))
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: line 2 "):
        read_metrics(tmp_path)


def test_a_kill_while_lines_are_removed_keeps_the_old_file(tmp_path, monkeypatch):
    train(tmp_path, 0, 5)
    before = lines_of(tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsWriter(tmp_path, resume_step=2)
    assert lines_of(tmp_path) == before


def test_every_line_is_on_disk_when_write_returns(tmp_path):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.write("train", 1, loss=1.0)
        assert lines_of(tmp_path) == [("train", 1, 1.0)]


def test_numbers_that_json_lacks_become_null(tmp_path):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        values = {"a": math.nan, "b": -math.inf, "c": np.float32(np.nan), "d": jax.numpy.float32(0.5), "e": np.int32(3)}
        writer.write("train", 1, **values)

    def refuse(constant):
        raise ValueError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"kind": "train", "step": 1, "a": None, "b": None, "c": None, "d": 0.5, "e": 3}


def test_any_text_survives(tmp_path):
    text = "成长 \u2028 \x00 \ud83d"  # the last one is half a pair, which UTF-8 cannot hold
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.write("sample", 1, text=text)
    assert "成长".encode() in (tmp_path / "metrics.jsonl").read_bytes()  # readable, not \\u6210
    MetricsWriter(tmp_path, resume_step=1).close()
    assert read_metrics(tmp_path)[0]["text"] == text


# ---- TensorBoard ----------------------------------------------------------------------------------------------------


def events(workdir: Path) -> list[Event]:
    out = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:  # a record: length (8 bytes), its checksum (4), the event, its checksum (4)
            (length,) = struct.unpack("<Q", data[:8])
            out.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return out


def test_tensorboard_hides_the_steps_that_a_resumed_run_repeats(tmp_path):
    train(tmp_path, 0, 3, value=0.25)
    train(tmp_path, 2, 3, value=0.5)  # in the same second: the first file must not be overwritten
    scalars = [(v.tag, e.step, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
    repeated = [("train/loss", 3, 0.25), ("train/loss", 3, 0.5)]
    assert sorted(scalars) == [("train/loss", s, 0.25) for s in (1, 2)] + repeated + [("validation/loss", 2, 0.25)]
    assert [e.step for e in events(tmp_path) if e.session_log.status == SessionLog.START] == [1, 3]


def test_texts_are_in_tensorboard_as_they_stand(tmp_path):
    text = "The \ud83d # no heading\n\n```\n成长"  # half of a UTF-16 pair; Markdown, which TensorBoard would render
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.write_text("sample/small", text, 5)
    ((tag, step, shown),) = [
        (v.tag, e.step, v.tensor.string_val[0].decode()) for e in events(tmp_path) for v in e.summary.value
    ]
    assert (tag, step) == ("sample/small/text_summary", 5)
    assert shown == "    The \\ud83d # no heading\n    \n    ```\n    成长"


# ---- progress -------------------------------------------------------------------------------------------------------

PROGRAM = """
from flmjax.workdir.progress import ProgressBar
with ProgressBar(total=40, initial=10) as bar:
    for step in (20, 30, 40):
        bar.update(step, stage="small", loss=2.5, tokens_per_second=12345.6)
    bar.log("validation 2.4")
"""


def test_a_log_file_gets_plain_lines_only():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, timeout=120, check=True)
    assert done.stderr == b""
    assert not re.search(rb"[\r\x1b]", done.stdout)
    lines = done.stdout.decode().splitlines()
    assert [line.split(" left")[0][:44] for line in lines[:3]] == [
        f"small {step}/40 loss 2.5000, 12,346 tokens/s, 00:00"[:44] for step in (20, 30, 40)
    ]
    assert lines[3:] == ["validation 2.4"]


def on_a_terminal(columns: int, program: str = PROGRAM) -> str:
    """What a program shows on a terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = subprocess.Popen([sys.executable, "-c", program], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # the child's end closes its side
        while chunk := os.read(ours, 4096):
            shown += chunk
    os.close(ours)
    assert child.wait(timeout=60) == 0
    return shown.decode()


def test_a_terminal_shows_a_bar_with_stage_loss_speed_and_time():
    shown = on_a_terminal(columns=100)
    assert re.search(r"\rsmall 40/40 \|.*\| \d\d:\d\d < 00:00, loss 2.5000, 12,346 tokens/s", shown)
    assert re.search(r"\rvalidation 2\.4\r\n", shown)


def test_a_terminal_without_a_width_gets_plain_lines():
    assert on_a_terminal(columns=0).startswith("small 20/40 loss 2.5000, 12,346 tokens/s, ")


def test_a_line_names_the_losses_of_text_and_teachers(capsys):
    """The loss of both (3.2) stood beside the validation loss of the text alone (5.2)."""
    with ProgressBar(total=40) as bar:
        bar.update(20, "small", 3.2, None, {"language": 5.25, "teacher": 0.25})
        bar.update(30, "small", 5.2, None, {"language": 5.25, "teacher": math.nan})
    lines = capsys.readouterr().out.splitlines()
    assert "loss 3.2000 (language 5.2500, teacher 0.2500), " in lines[0]
    assert "loss 5.2000 (language 5.2500), " in lines[1]


COMPILES = """
import time
from flmjax.workdir import progress
progress.TICK_SECONDS = 0.2
with progress.ProgressBar(total=40) as bar:
    with bar.doing("compiling stage small"):
        time.sleep(1.5)
    bar.resume(10)
    bar.update(20, stage="small", loss=2.5, tokens_per_second=None)
"""


def test_a_terminal_shows_a_clock_that_ticks_while_a_stage_compiles():
    shown = on_a_terminal(100, COMPILES)
    assert "compiling stage small 00:00" in shown
    assert "compiling stage small 00:01" in shown
    assert re.search(r"\rsmall 20/40 \|.*, loss 2.5000(?!.*tokens/s)", shown)
    done = subprocess.run([sys.executable, "-c", COMPILES], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[0] == "compiling stage small"
    assert "tokens/s" not in done.stdout  # the first step has no speed: it is not 0
