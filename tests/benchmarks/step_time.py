"""Tokens/s of our training step against Hugging Face GPT-2 in PyTorch, eager and compiled.

    python tests/benchmarks/step_time.py [--repeats 15] [--microbatches 1] [--threads N]

Every model: 4 layers x 256, 4 heads, MLP 1024, vocabulary 8192, 8 x 256 tokens, learned positions, GELU (tanh), biases,
tied embedding, float32, clip 1.0, AdamW. One round runs one step of each, so that what else the machine does hits all
alike; "paired" is the median over rounds of our speed by the better PyTorch one of the same round. Nothing is asserted:
times belong to the machine they were taken on.
"""

import argparse
import functools
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flmjax.config import MeshShape, ModelConfig, OptimizerConfig
from flmjax.data.batch import global_batch
from flmjax.model.flops import flops_per_token
from flmjax.sharding.mesh import make_mesh
from flmjax.sharding.rules import batch_sharding
from flmjax.training.state import init_state, state_spec
from flmjax.training.step import jit_train_step

BATCH, LENGTH = 8, 256
TOKENS = BATCH * LENGTH
MODEL = ModelConfig(
    num_layers=4,
    embed_dim=256,
    num_heads=4,
    head_dim=64,
    mlp_dim=1024,
    vocab_size=8192,
    max_length=LENGTH,
    activation="gelu_tanh",
    position="learned",
    scan_unroll=4,
)
OPTIMIZER = OptimizerConfig(b1=0.9, b2=0.95, weight_decay=0.1, clip_norm=1.0)
LEARNING_RATE = 1e-3
PEAK_SIZES = (1024, 1536, 2048)  # square matrices; the best of them counts

Step = Callable[[], float]  # one update, finished when it returns; gives the loss


def rows() -> np.ndarray:
    """One batch (8, 257) of random ids: the arithmetic does not depend on what they are."""
    return np.random.default_rng(0).integers(0, MODEL.vocab_size, (BATCH, LENGTH + 1))


def ours(microbatches: int) -> Step:
    """The step that `flmjax train` runs."""
    mesh = make_mesh(MeshShape(1, 1, 1), jax.devices()[:1])
    spec = state_spec(MODEL, OPTIMIZER, mesh)
    tokens = rows().astype(np.int32)
    ones = {"weights": np.ones((BATCH, LENGTH), np.float32), "bytes": np.ones(BATCH, np.float32)}
    batch = global_batch({"tokens": tokens[:, :-1], "targets": tokens[:, 1:], **ones}, batch_sharding(mesh))
    compiled = jit_train_step(spec, microbatches)
    state, learning_rate = init_state(spec, 0), jnp.float32(LEARNING_RATE)

    def step() -> float:
        nonlocal state
        state, metrics = compiled(state, batch, learning_rate)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step


def hugging_face(compiled: bool) -> Step:
    """GPT2LMHeadModel without dropout; loss over all tokens, fused AdamW (faster here than foreach)."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=MODEL.vocab_size,
        n_positions=LENGTH,
        n_embd=MODEL.embed_dim,
        n_layer=MODEL.num_layers,
        n_head=MODEL.num_heads,
        n_inner=MODEL.mlp_dim,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, betas=(OPTIMIZER.b1, OPTIMIZER.b2), weight_decay=0.1, fused=True
    )
    tokens = torch.from_numpy(rows())

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=tokens[:, :-1]).logits
        return torch.nn.functional.cross_entropy(logits.reshape(-1, MODEL.vocab_size), tokens[:, 1:].reshape(-1))

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.item()

    return step


def products() -> dict[str, Step]:
    """Square float32 matrix multiplications in both libraries, by "library size"."""
    import torch

    out: dict[str, Step] = {}
    multiply = jax.jit(jnp.matmul)
    for size in PEAK_SIZES:
        a = np.random.default_rng(0).standard_normal((size, size), np.float32)
        out[f"jax {size}"] = functools.partial(_corner, multiply, jnp.asarray(a))
        out[f"torch {size}"] = functools.partial(_corner, torch.matmul, torch.from_numpy(a))
    return out


def _corner(multiply: Callable, a: Any) -> float:
    return float(multiply(a, a)[0, 0])  # reading one entry waits for all of them


def measure(steps: dict[str, Step], repeats: int) -> dict[str, list[float]]:
    """Seconds of every step in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def table(seconds: dict[str, list[float]], peak: float) -> str:
    """Lines of name, tokens/s, share of the peak and ratios to the better PyTorch step."""
    torch_names = [name for name in seconds if name != "ours"]
    fastest_median = min(statistics.median(seconds[name]) for name in torch_names)
    fastest_minimum = min(min(seconds[name]) for name in torch_names)
    best_of_round = [min(times) for times in zip(*(seconds[name] for name in torch_names), strict=True)]
    flops = TOKENS * flops_per_token(MODEL, LENGTH)
    lines = [f"{'step':14}{'tokens/s':>10}{'% of peak':>11}{'ratio':>8}{'fastest':>9}{'paired':>8}"]
    for name, times in seconds.items():
        median = statistics.median(times)
        paired = statistics.median(torch / own for torch, own in zip(best_of_round, times, strict=True))
        lines.append(
            f"{name:14}{TOKENS / median:10.0f}{100 * flops / median / peak:11.0f}{fastest_median / median:8.2f}"
            f"{fastest_minimum / min(times):9.2f}{paired:8.2f}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15, help="rounds; medians are over them")
    parser.add_argument("--microbatches", type=int, default=1, help="of our step")
    parser.add_argument("--threads", type=int, default=None, help="of PyTorch; default: the CPUs of this process")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats={args.repeats} must be positive")
    if BATCH % max(args.microbatches, 1) or args.microbatches < 1:
        parser.error(f"--microbatches={args.microbatches} must divide the {BATCH} rows")
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        print("step_time.py compares with PyTorch and transformers: pip install 'flmjax[bench]'", file=sys.stderr)
        return 1
    import torch

    threads = args.threads or len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    steps = {"ours": ours(args.microbatches), "HF eager": hugging_face(False), "HF compiled": hugging_face(True)}
    for name, step in steps.items():
        losses = [step() for _ in range(3)]  # compiles; the first steps of random weights start near log 8192 = 9.01
        print(f"{name}: losses {', '.join(f'{loss:.3f}' for loss in losses)}", flush=True)
    peaks = products()
    measure(peaks, 2)
    seconds = measure({**peaks, **steps}, args.repeats)
    # The peak: each size's fastest round, so that a busy moment does not make the limit look lower than it is.
    rates = {name: 2 * int(name.split()[1]) ** 3 / min(seconds[name]) for name in peaks}
    best = max(rates, key=rates.__getitem__)
    print(f"{TOKENS} tokens a step, {args.repeats} rounds, {threads} threads; matrix-multiply peak", end=" ")
    print(f"{rates[best] / 1e9:.0f} GFLOP/s ({best})")
    print(table({name: seconds[name] for name in steps}, rates[best]))
    print("ratio: of medians to the better PyTorch; fastest: of fastest rounds; paired: median of ratios by round")
    return 0


if __name__ == "__main__":
    sys.exit(main())
