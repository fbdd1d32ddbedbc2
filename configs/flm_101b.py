"""FLM-101B: one run that grows, 16B -> 51B -> 101B, on 311.5B tokens (arXiv 2309.03852).

What it reproduces: the paper's schedule (table 2), block, vocabulary and hyper-parameters. Of each number the comment
says whether the paper states it, it is derived from what the paper states, or it is our choice: the structures of 16B
and 51B are not published. The text is the paper's English and Chinese mixture in kind, not in its documents.

Argument: at most one word of each kind, separated by commas, for example `tpu_v4,16b`.
    machine   a800 (default), h100, h200, tpu_v5p, tpu_v4, tpu_v6e; or cpu, a small twin that runs in minutes (below)
    stage     without a word all three stages, grown. `16b` and `51b`: the model of that stage alone, from random
              weights, with the stage's steps, batch and rates.
              16b: 245.4B tokens. configs/eflm_16b.py continues from this run, and `flmjax grow` makes a larger model
              of it.
              51b: a control for the second stage, 39.64B tokens in all; the paper never trained 51B from scratch. The
              gap to the loss of the grown 51B is the benefit of growth. So few tokens are not
              enough for a good 51B, and random weights may want a longer warm-up than the grown stage's.
              Either ends at the rate at which the next stage would start; with sawtooth it ends at 6e-6.
    operator  zero (default) or mask. The operator of the paper is MSG's mask; the length of its ramp is not published;
              the stage's warm-up is our choice. zero departs from the paper: new outputs start at 0 instead of behind a
              mask that opens.
    border    undecayed (default) or sawtooth: the rates at which a stage ends. The paper states the rate at the start
              of every stage, which fall (4e-4, 3.4e-4, 2e-4), and one final rate, 6e-6. undecayed: a stage decays to
              the start of the next one, and the last one to 6e-6. sawtooth: every stage decays to 6e-6 and warms up
              again from 0. Both readings are ours.

Machines, 2048 tokens a sequence; by `flmjax plan --config=configs/flm_101b.py:MACHINE[,STAGE]`, the memory of a device
where it is largest, and days. The paper: 21.5 days, of them 9.63 for 16B and 5.37 for 51B.
                                               all stages         16b               51b
    a800     192 A800 80 GB (24 nodes of 8)    66 GiB, 18 days    58 GiB,  7 days   66 GiB, 4 days
    h100     128 H100 80 GB (16 nodes of 8)    67 GiB,  9 days    58 GiB,  4 days   66 GiB, 2 days
    h200     128 H200 (16 nodes of 8)         111 GiB,  8 days    88 GiB,  3 days  111 GiB, 2 days
    tpu_v6e  256 chips, 16x16                  30 GiB,  6 days    18 GiB,  3 days   30 GiB, 1 day
    tpu_v5p  256 chips, 4x8x8                  23 GiB, 12 days     7 GiB,  6 days   14 GiB, 3 days
    tpu_v4   256 chips, 4x8x8                  16 GiB, 25 days     4 GiB, 12 days    8 GiB, 6 days

Launch with a workdir that all hosts see; the file runs `flmjax train` with this config on every host. Site settings
(partition, account, modules...) come from --site=FILE, a copy of flmjax/launch/site.toml:
        flmjax launch slurm --config=configs/flm_101b.py:a800 --workdir=/shared/flm_101b --output=flm.sbatch
        sbatch flm.sbatch

The small twin runs in minutes on a CPU: the same block, stages and operators, 0.2M -> 0.7M -> 1.3M parameters, bytes of
Python's documentation. Widths are 1/64 of the run's, steps 1/200, rates ten times as high. It shows that the schedule
runs, not how good an FLM becomes.
        flmjax train --config=configs/flm_101b.py:cpu --workdir=runs/flm_cpu
"""

import dataclasses
from typing import NamedTuple

from flmjax.config import (
    STAGE_SIZES,
    CheckpointConfig,
    ConfigError,
    DataConfig,
    GrowthConfig,
    MeshConfig,
    MeshShape,
    ModelConfig,
    RunConfig,
    StageConfig,
    StageMeshConfig,
    choose_words,
    to_config_dict,
    with_layout,
)


class Machine(NamedTuple):
    """A machine, and the layouts of 16B, 51B and 101B on it: (mesh, remat, microbatches)."""

    topology: str
    layouts: tuple[tuple[MeshShape, str, int], ...]


# The layouts of a800, h100, h200 and tpu_v6e are the fastest that `flmjax plan --search-layout` found. Those of tpu_v5p
# and tpu_v4 were not searched: one layout serves all stages.
# Few and large microbatches: each one gathers all weights twice. Tensor parallelism stays inside a node. Over fsdp 64 a
# shard has 160 rows of 10240, ten whole tiles of a TPU, and 88 of 5632, five and a half: a third of 16B's gradients are
# reduced without scattering there.
MACHINES = {
    "a800": Machine(
        "a800:24x8",
        ((MeshShape(3, 64, 1), "dots", 2), (MeshShape(3, 64, 1), "dots", 4), (MeshShape(3, 16, 4), "full", 3)),
    ),
    "h100": Machine(
        "h100:16x8",
        ((MeshShape(2, 64, 1), "dots", 3), (MeshShape(2, 64, 1), "full", 1), (MeshShape(2, 64, 1), "full", 3)),
    ),
    "h200": Machine(
        "h200:16x8",
        ((MeshShape(4, 32, 1), "dots", 2), (MeshShape(2, 64, 1), "dots", 3), (MeshShape(2, 64, 1), "full", 1)),
    ),
    "tpu_v5p": Machine("v5p:4x8x8", ((MeshShape(1, 64, 4), "full", 3),) * 3),
    "tpu_v4": Machine("v4:4x8x8", ((MeshShape(1, 64, 4), "full", 9),) * 3),
    "tpu_v6e": Machine(
        "v6e:16x16",
        ((MeshShape(4, 64, 1), "full", 1), (MeshShape(2, 64, 2), "full", 1), (MeshShape(1, 64, 4), "full", 2)),
    ),
}
MODEL = ModelConfig(
    num_layers=40,  # our choice, like the next four: 16B of the paper's several possible shapes
    embed_dim=5632,
    num_heads=44,
    head_dim=128,  # stated for 101B: 10240 / 80
    mlp_dim=22_528,  # 4 x 5632, GPT-3's
    vocab_size=100_256,  # stated: cl100k without its control tokens
    max_length=2048,  # stated
    norm="layernorm",  # derived: what Tele-FLM's paper lists as changed from FLM
    activation="gelu",  # derived
    position="xpos",  # stated
    bias=True,  # derived
    tied_embedding=True,  # derived
    base_embed_dim=256,  # stated: the proxy's width for muP
    init_std=1.6e-2,  # stated
    softmax_temperature=2.0,  # stated; that logits are divided by it is derived
    dtype="bfloat16",  # stated
    attention="fused",  # stated: FlashAttention
)
STAGES, BORDERS = ("16b", "51b"), ("undecayed", "sawtooth")
# Stated: each stage has a schedule of its own. Both operators are exact at the growth.
OPERATORS = {
    "zero": GrowthConfig("zero", rate_policy="stage"),
    "mask": GrowthConfig("mask", rate_policy="stage"),
}


def get_config(argument: str = ""):
    """The run; `argument` has at most one word each for machine, stage, operator and border."""
    words = choose_words(argument, machine=(*MACHINES, "cpu"), stage=STAGES, operator=OPERATORS, border=BORDERS)
    is_cpu = words["machine"] == "cpu"
    if words["stage"] and words["operator"]:
        raise ConfigError(
            f"operator '{words['operator']}' is not read with '{words['stage']}': a run of one stage does not grow"
        )
    growth, is_sawtooth = OPERATORS[words["operator"] or "zero"], words["border"] == "sawtooth"
    run = _twin(growth, is_sawtooth) if is_cpu else _full(growth, is_sawtooth, words["machine"] or "a800")
    return to_config_dict(_alone(run, STAGES.index(words["stage"])) if words["stage"] else run)


def _full(growth: GrowthConfig, is_sawtooth: bool, machine: str) -> RunConfig:
    return RunConfig(
        model=MODEL,
        stages=_stages(growth, is_sawtooth, machine),
        data=DataConfig(
            mixture="flm_c4",  # English : Chinese 53.5 : 46.5, stated; its sources are our choice
            vocabulary="cl100k",
            end_id=1432,  # our choice: three line breaks; no id of the 100,256 is free
        ),
        mesh=MeshConfig(topology=MACHINES[machine].topology),  # every stage states its mesh
        checkpoint=CheckpointConfig(every=250, keep=3),  # our choice, like what follows
        log_every=10,
        evaluate_every=1000,
        evaluation_rows=2304,
        certificate_rows=192,
    )


def _stages(growth: GrowthConfig, is_sawtooth: bool, machine: str) -> tuple[StageConfig, ...]:
    # Stated: 6,000 steps of 2160, which a800's 48 data shards divide. Others take the same tokens in 5,625 of 2304.
    batch, steps, warmup = (2160, 6_000, 107) if machine == "a800" else (2304, 5_625, 100)
    stages = (
        StageConfig(
            name="16B",
            steps=52_000,  # stated, like batch, rate and warm-up of every stage: 245.37B tokens
            batch_size=2304,
            learning_rate=4e-4,
            warmup_steps=2000,  # 4,608,000 samples
            schedule="cosine",  # stated
        ),
        StageConfig(
            name="51B",
            steps=8_400,  # 8,400 x 2304 x 2048 = 39.64B tokens
            batch_size=2304,
            learning_rate=3.4e-4,
            warmup_steps=100,  # 230,400 samples
            growth=_with_ramp(growth, 100),
            embed_dim=10_240,  # our choice: 51B has 101B's width
            num_heads=80,
            mlp_dim=40_960,
            schedule="cosine",  # stated
        ),
        StageConfig(
            name="101B",
            steps=steps,
            batch_size=batch,
            learning_rate=2e-4,
            warmup_steps=warmup,  # 230,400 samples
            growth=_with_ramp(growth, warmup),
            num_layers=80,  # stated, with width 10240 and 80 heads
            schedule="cosine",  # stated
        ),
    )
    layouts = zip(_with_borders(stages, is_sawtooth), MACHINES[machine].layouts, strict=True)
    return tuple(with_layout(stage, *layout) for stage, layout in layouts)


def _with_borders(stages: tuple[StageConfig, ...], is_sawtooth: bool) -> tuple[StageConfig, ...]:
    """The stages with the rates at which they end, and from which their warm-ups rise: our choice, but for 6e-6."""
    starts = [stage.learning_rate for stage in stages]
    finals = [6e-6] * len(stages) if is_sawtooth else [*starts[1:], 6e-6]  # stated: 6e-6 at the end of the run
    initials = [None] * len(stages) if is_sawtooth else [None, *finals[:-1]]
    return tuple(
        dataclasses.replace(stage, final_learning_rate=final, initial_learning_rate=initial)
        for stage, final, initial in zip(stages, finals, initials, strict=True)
    )


def _with_ramp(growth: GrowthConfig, updates: int) -> GrowthConfig:
    """The operator; a mask opens over `updates`."""
    return dataclasses.replace(growth, ramp_steps=updates) if growth.family == "mask" else growth


def _alone(run: RunConfig, index: int) -> RunConfig:
    """A run of the stage `index` alone, from random weights. Its norm epsilon stays that of the grown model."""
    stage, unset = run.schedule[index], dict.fromkeys((*STAGE_SIZES, "initial_learning_rate"))
    config = dataclasses.replace(stage.config, growth=GrowthConfig(), **unset)
    return dataclasses.replace(run, model=stage.model, stages=(config,), certificate_rows=RunConfig.certificate_rows)


def _twin(growth: GrowthConfig, is_sawtooth: bool) -> RunConfig:
    """The run of 101B on one CPU in minutes; every number that differs from the large run's is our choice."""
    run = _full(growth, is_sawtooth, "a800")
    model = dataclasses.replace(
        MODEL,
        num_layers=2,  # 40 / 20
        embed_dim=88,  # 5632 / 64
        num_heads=11,  # 44 / 4
        head_dim=8,
        mlp_dim=352,  # 4 x 88
        vocab_size=257,  # bytes and the end of a document
        max_length=128,
        base_embed_dim=88,  # the rates below are for this width
        dtype="float32",
        scan_unroll=4,
    )
    sizes: tuple[dict[str, int], ...] = ({}, {"embed_dim": 160, "num_heads": 20, "mlp_dim": 640}, {"num_layers": 4})
    stages = tuple(
        dataclasses.replace(
            stage,
            **size,
            steps=stage.steps // 200,
            batch_size=24,
            microbatches=1,
            mesh=StageMeshConfig(),
            remat=None,
            learning_rate=10 * stage.learning_rate,
            final_learning_rate=10 * stage.final_learning_rate,
            initial_learning_rate=stage.initial_learning_rate and 10 * stage.initial_learning_rate,
            warmup_steps=warmup,
            growth=_with_ramp(stage.growth, 10),
        )
        for stage, size, warmup in zip(run.stages, sizes, (20, 5, 5), strict=True)
    )
    return RunConfig(
        model=model,
        stages=stages,
        data=DataConfig(vocabulary="bytes"),
        checkpoint=CheckpointConfig(every=100),
        evaluate_every=50,
    )
