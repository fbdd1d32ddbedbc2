"""A 7B model grown in three stages, 1.0B -> 3.6B -> 6.9B, on 141B tokens: for 8 to 64 GPUs or 64 TPU chips.

What it reproduces: the way of FLM-101B (arXiv 2309.03852), width first and then depth, in the size that most people can
book. The block is Llama's (RMSNorm, SwiGLU, rotary positions, no biases) with the muP values of FLM's search. Sizes,
tokens and steps are our choice: 20 tokens for each parameter of the last model (arXiv 2203.15556), shared out over the
stages about as FLM-101B shares them.

Argument: the machine.
    h100_64  64 H100 (8 nodes of 8), the default
    h100_8   8 H100, one node
    v5e_64   64 chips of TPU v5e, 8x8
    v6e_64   64 chips of TPU v6e, 8x8

Launch on every host, with the same workdir on a file system that all hosts see:
        flmjax train --config=configs/growth_7b.py:h100_64 --workdir=/shared/growth_7b
"""

from flmjax.config import (
    CheckpointConfig,
    DataConfig,
    GrowthConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
    choose_words,
    to_config_dict,
)

# Mesh and, for each stage, its number of microbatches.
MACHINES = {
    "h100_64": (MeshConfig(replica=1, fsdp=64, topology="h100:8x8"), (1, 2, 4)),
    "h100_8": (MeshConfig(replica=1, fsdp=8, topology="h100:1x8"), (4, 8, 16)),
    "v5e_64": (MeshConfig(replica=1, fsdp=64, topology="v5e:8x8"), (4, 8, 16)),
    "v6e_64": (MeshConfig(replica=1, fsdp=64, topology="v6e:8x8"), (2, 4, 8)),
}


def get_config(argument: str = ""):
    """The run on the machine that `argument` names."""
    mesh, microbatches = MACHINES[choose_words(argument, machine=MACHINES)["machine"] or "h100_64"]
    growth = GrowthConfig("zero", rate_policy="stage")
    small, wide, deep = microbatches
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
            base_embed_dim=256,  # the width of FLM-101B's proxy, whose values the next two are
            init_std=1.6e-2,
            softmax_temperature=2.0,
            dtype="bfloat16",
            remat="full",
            attention="fused",
        ),
        # 1024 x 4096 = 4.19M tokens an update.
        stages=(
            StageConfig(
                name="1.0B",
                steps=24_000,  # 24,000 x 4.19M = 100.7B tokens
                batch_size=1024,
                microbatches=small,
                learning_rate=4e-4,
                final_learning_rate=3.4e-4,
                warmup_steps=2000,
            ),
            StageConfig(
                name="3.6B",
                steps=6_000,  # 25.2B tokens
                batch_size=1024,
                microbatches=wide,
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
                microbatches=deep,
                learning_rate=2e-4,
                final_learning_rate=6e-6,
                growth=growth,
                num_layers=32,
            ),
        ),
        data=DataConfig(mixture="flm_c4", vocabulary="cl100k", end_id=1432),
        mesh=mesh,
        checkpoint=CheckpointConfig(every=1000, every_minutes=30),
        evaluate_every=1000,
        evaluation_rows=1024,
        certificate_rows=64,
    )
    return to_config_dict(run)
