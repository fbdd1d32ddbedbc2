"""A 7B model grown in three stages, 1.0B -> 3.6B -> 6.9B, on 141B tokens: for 8 to 64 GPUs or 64 TPU chips.

What it reproduces: the way of FLM-101B (arXiv 2309.03852), width first and then depth, in the size that most people can
book. The block is Llama's (RMSNorm, SwiGLU, rotary positions, no biases) with the muP values of FLM's search. Sizes,
tokens and steps are our choice: 20 tokens for each parameter of the last model (arXiv 2203.15556), shared out over the
stages about as FLM-101B shares them.

Argument: the machine; by `flmjax plan`, the memory of a device where it is largest, and days.
    h100_64  64 H100 (8 nodes of 8), the default: 56 GiB, 0.6 days
    h100_8   8 H100, one node: 60 GiB, 4.8 days
    v5e_64   64 chips of TPU v5e, 8x8; not planned
    v6e_64   64 chips of TPU v6e, 8x8; not planned

Launch on every host, with the same workdir on a file system that all hosts see:
        flmjax train --config=configs/growth_7b.py:h100_64 --workdir=/shared/growth_7b
"""

import dataclasses

from flmjax.config import (
    CheckpointConfig,
    DataConfig,
    GrowthConfig,
    MeshConfig,
    MeshShape,
    ModelConfig,
    RunConfig,
    StageConfig,
    choose_words,
    to_config_dict,
    with_layout,
)

# The topology of a machine, and the layouts of 1.0B, 3.6B and 6.9B on it: (mesh, remat, microbatches). The layouts of
# H100s are the fastest that `flmjax plan --search-layout` found; the layouts of TPUs were not searched.
MACHINES = {
    "h100_64": (
        "h100:8x8",
        ((MeshShape(2, 32, 1), "none", 2), (MeshShape(1, 64, 1), "dots", 2), (MeshShape(1, 64, 1), "dots", 4)),
    ),
    "h100_8": (
        "h100:1x8",
        ((MeshShape(8, 1, 1), "none", 32), (MeshShape(1, 8, 1), "dots", 16), (MeshShape(2, 4, 1), "dots", 64)),
    ),
    "v5e_64": (
        "v5e:8x8",
        ((MeshShape(1, 64, 1), "full", 4), (MeshShape(1, 64, 1), "full", 8), (MeshShape(1, 64, 1), "full", 16)),
    ),
    "v6e_64": (
        "v6e:8x8",
        ((MeshShape(1, 64, 1), "full", 2), (MeshShape(1, 64, 1), "full", 4), (MeshShape(1, 64, 1), "full", 8)),
    ),
}


def get_config(argument: str = ""):
    """The run on the machine that `argument` names."""
    topology, layouts = MACHINES[choose_words(argument, machine=MACHINES)["machine"] or "h100_64"]
    growth = GrowthConfig("zero", rate_policy="stage")
    run = RunConfig(
        model=ModelConfig(
            num_layers=16,
            embed_dim=2048,
            num_heads=16,
            head_dim=128,
            mlp_dim=5504,  # 8/3 x 2048, rounded up to a multiple of 128
            vocab_size=100_256,  # cl100k without its control tokens
            max_length=4096,
            norm="rmsnorm",
            activation="swiglu",
            position="rope",
            bias=False,
            base_embed_dim=256,  # the width of FLM-101B's proxy; the next two values are the results of its search
            init_std=1.6e-2,
            softmax_temperature=2.0,
            dtype="bfloat16",
            attention="fused",
        ),
        # 1024 x 4096 = 4.19M tokens an update.
        stages=(
            StageConfig(
                name="1.0B",
                steps=24_000,  # 24,000 x 4.19M = 100.7B tokens
                batch_size=1024,
                learning_rate=4e-4,
                final_learning_rate=3.4e-4,
                warmup_steps=2000,
            ),
            StageConfig(
                name="3.6B",
                steps=6_000,  # 25.2B tokens
                batch_size=1024,
                learning_rate=3.4e-4,
                final_learning_rate=2e-4,
                growth=growth,
                embed_dim=4096,
                num_heads=32,
                mlp_dim=11_008,
            ),
            StageConfig(
                name="6.9B",
                steps=3_600,  # 15.1B tokens
                batch_size=1024,
                learning_rate=2e-4,
                final_learning_rate=6e-6,
                growth=growth,
                num_layers=32,
            ),
        ),
        # English and Chinese of C4, as in flm_101b.py: pip install 'flmjax[data]'. Id 1432 is three line breaks.
        data=DataConfig(mixture="flm_c4", vocabulary="cl100k", end_id=1432),
        mesh=MeshConfig(topology=topology),  # every stage states its mesh
        checkpoint=CheckpointConfig(every=1000, every_minutes=30),
        evaluate_every=1000,
        evaluation_rows=1024,
        certificate_rows=64,
    )
    stages = tuple(with_layout(stage, *layout) for stage, layout in zip(run.stages, layouts, strict=True))
    return to_config_dict(dataclasses.replace(run, stages=stages))
