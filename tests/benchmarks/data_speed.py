"""How fast text becomes tokens and tokens become batches: python tests/benchmarks/data_speed.py [--megabytes N] [FILES]

In one run: the bare tokenizer, `prepare` of N MB of text with cl100k (all processes, with their memory), the same task
through seqio, the loader at length 2048, and the loader against the training step of the quickstart. FILES are text to
repeat until there are N MB; without them the built-in corpora are taken.
"""

import argparse
import importlib
import importlib.util
import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("files", nargs="*", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = load_texts(options.files)
        write_text(folder / "text", texts, options.megabytes)
        bare = tokenizer_speed(texts)
        print(f"bare tokenizer, one process: {bare / 1e6:.2f}M tokens/s", flush=True)
        tokens, seconds, memory = prepare_speed(folder)
        print(
            f"prepare of {options.megabytes} MB on {len(os.sched_getaffinity(0))} cores: {tokens / seconds / 1e6:.2f}M "
            f"tokens/s ({tokens / seconds / bare:.2f} of the bare tokenizer), {memory / 2**30:.2f} GiB at most",
            flush=True,
        )
        if importlib.util.find_spec("seqio"):
            print(f"the tokenizer inside a seqio Task: {seqio_speed(folder, texts) / 1e6:.2f}M tokens/s", flush=True)
        loader = loader_speed(folder, length=2048, batch_size=16)
        print(f"loader at length 2048, two sources: {loader / 1e6:.2f}M tokens/s", flush=True)
        step, short = step_speed(folder), loader_speed(folder, length=128, batch_size=16)
        print(f"quickstart: training takes {step:,.0f} tokens/s, the loader gives {short / step:.0f} times that")


def load_texts(files: list[Path]) -> list[str]:
    """Documents to repeat."""
    from flmjax.data.sources import hsk, python_docs, text_files
    from flmjax.data.sources.files import Files

    if files:
        return [d.text for f in files for d in text_files.documents(Files([f], f.parent))]
    return [*python_docs.documents(), *(d.text for d in hsk.documents())]


def write_text(folder: Path, texts: list[str], megabytes: int) -> None:
    """Two sources of `megabytes` together; a number makes every document another one."""
    folder.mkdir()
    for part in ("a", "b"):
        with (folder / f"{part}.txt").open("w") as file:
            for i, text in enumerate(itertools.cycle(texts)):
                file.write(f"{part}{i} {text}\n\n\n")
                if file.tell() > megabytes * 500_000:
                    break


def tokenizer_speed(texts: list[str]) -> float:
    """Tokens a second of the package alone, on documents as they are."""
    import bpe_openai

    encode = bpe_openai.get_encoding("cl100k_base").encode_ordinary
    texts = [text for text in texts if len(text) < 50_000]
    sum(len(encode(text)) for text in texts[:100])
    start, tokens = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < 10:  # as long as a busy neighbour needs to show
        tokens += sum(len(encode(text)) for text in texts)
    return tokens / seconds


PREPARE = """
import sys
from pathlib import Path
from flmjax.config import DataConfig
from flmjax.data.prepare import prepare
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    sources = tuple(f"{folder}/text/{part}.txt" for part in "ab")
    prepare(DataConfig(sources=sources, vocabulary="cl100k", validation_fraction=0.01), folder / "data")
"""


def prepare_speed(folder: Path) -> tuple[int, float, int]:
    """(tokens, seconds, bytes of memory at most over all processes) of a process that prepares the text."""
    from flmjax.data.prepared import load

    script = folder / "script.py"
    script.write_text(PREPARE)
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, script, folder], cwd=ROOT, start_new_session=True)
    peak = [0]
    watcher = threading.Thread(target=watch, args=(process, peak))
    watcher.start()
    if process.wait():
        raise RuntimeError("prepare failed")
    seconds = time.perf_counter() - start
    watcher.join()
    data = load(folder / "data")
    return sum(data.num_tokens(s, split) for s in data.sources for split in ("train", "validation")), seconds, peak[0]


def watch(process: subprocess.Popen, peak: list[int]) -> None:
    """Keep the largest sum of what the processes of a session have in memory, shared pages divided."""
    while process.poll() is None:
        total = 0
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if int((path / "stat").read_text().rsplit(") ", 1)[1].split()[3]) != process.pid:
                    continue
                lines = (path / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
            except (OSError, IndexError):
                continue
        peak[0] = max(peak[0], total)
        time.sleep(0.1)


def seqio_speed(folder: Path, texts: list[str]) -> float:
    """Tokens a second of a Task that tokenises in its graph, on documents of one line each."""
    from flmjax.data.sources.seqio_tasks import Cl100kVocabulary, seqio

    path = folder / "lines.txt"
    path.write_text("".join(f"{' '.join(text.split())}\n" for text in texts * 4))
    features = {"targets": seqio.Feature(Cl100kVocabulary())}
    task = seqio.Task(
        "data_speed",
        source=seqio.TextLineDataSource({"train": str(path)}),
        preprocessors=[
            lambda ds: seqio.map_over_dataset(lambda line: {"targets": line})(ds),
            seqio.preprocessors.tokenize,
        ],
        output_features=features,
    )
    start, tokens = time.perf_counter(), 0
    for example in task.get_dataset(shuffle=False).as_numpy_iterator():
        tokens += len(example["targets"])
    return tokens / (time.perf_counter() - start)


def loader_speed(folder: Path, length: int, batch_size: int, tokens: int = 8_000_000) -> float:
    """Tokens a second of batches of the prepared text."""
    from flmjax.config import DataConfig
    from flmjax.data.loader import TrainingStream
    from flmjax.data.mixture import MixturePhase
    from flmjax.data.prepared import load

    prepared = load(folder / "data")
    stream = TrainingStream(prepared, DataConfig(), 0, length, (MixturePhase((0.535, 0.465), None),))
    rows = stream.batches(start=1_000_000_000, batch_size=batch_size)
    next(rows)
    count = max(20, min(tokens // (batch_size * length), 2000))
    start = time.perf_counter()
    for _ in range(count):
        next(rows)
    seconds = time.perf_counter() - start
    rows.close()
    return count * batch_size * length / seconds


def step_speed(folder: Path, steps: int = 30) -> float:
    """Tokens a second of the quickstart's first training step."""
    import dataclasses

    import jax
    import numpy as np

    from flmjax.config import MeshShape, from_config_dict
    from flmjax.data.batch import global_batch
    from flmjax.sharding.mesh import make_mesh
    from flmjax.sharding.rules import batch_sharding
    from flmjax.training.state import init_state, state_spec
    from flmjax.training.step import jit_train_step

    sys.path.insert(0, str(ROOT / "configs"))
    config = from_config_dict(importlib.import_module("quickstart").get_config())
    model = dataclasses.replace(config.stage_models[0], vocab_size=config.data.vocab_size)
    mesh = make_mesh(MeshShape(1, 1, 1), jax.devices()[:1])
    spec = state_spec(model, config.optimizer, mesh)
    state, step = init_state(spec, 0), jit_train_step(spec, 1)
    shape = (config.stages[0].batch_size, model.max_length)
    rng = np.random.default_rng(0)
    rows = {name: rng.integers(0, 2000, shape).astype(np.int32) for name in ("tokens", "targets")}
    rows |= {"weights": np.ones(shape, np.float32), "bytes": np.ones(shape[0], np.float32)}
    batch = global_batch(rows, batch_sharding(mesh))
    state, metrics = step(state, batch, np.float32(1e-3))
    jax.block_until_ready(metrics)
    start = time.perf_counter()
    for _ in range(steps):
        state, metrics = step(state, batch, np.float32(1e-3))
    jax.block_until_ready(metrics)
    return steps * shape[0] * shape[1] / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
