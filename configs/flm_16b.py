"""FLM-16B: the first stage of FLM-101B alone, 245.4B tokens from scratch (arXiv 2309.03852).

What it reproduces: the stage 16B of the paper's table 2, with the numbers of configs/flm_101b.py. A finished run is
what configs/eflm_16b.py goes on from, and `flmjax grow` makes a larger model of it. Of each number the comment says
whether the paper states it, it is derived from what the paper states, or it is our choice.

Machines, 2048 tokens a row; memory and days by `flmjax plan --config=configs/flm_16b.py:MACHINE`, at most:
        a800     192 A800 80 GB (24 nodes of 8)    14 GiB a device    10 days (the paper: 9.63)
        tpu_v5p  256 chips, 4x8x8                   8 GiB              6 days
        tpu_v4   256 chips, 4x8x8                   4 GiB             10 days
        tpu_v6e  256 chips, 16x16                   4 GiB              4 days

Launch on every host, with the same workdir on a file system that all hosts see:
        flmjax train --config=configs/flm_16b.py:a800 --workdir=/shared/flm_16b
"""

from flmjax.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
    nearest,
    to_config_dict,
)

# (mesh, microbatches), those of the stage in flm_101b.py: the same program.
MACHINES = {
    "a800": (MeshConfig(replica=3, fsdp=16, tensor=4, topology="a800:24x8"), 3),
    "tpu_v5p": (MeshConfig(replica=1, fsdp=64, tensor=4, topology="v5p:4x8x8"), 3),
    "tpu_v4": (MeshConfig(replica=1, fsdp=64, tensor=4, topology="v4:4x8x8"), 9),
    "tpu_v6e": (MeshConfig(replica=1, fsdp=64, tensor=4, topology="v6e:16x16"), 9),
}


def get_config(machine: str = "a800"):
    """The run on one of MACHINES."""
    if machine not in MACHINES:
        raise ConfigError(f"flm_16b.py:{machine}{nearest(machine, MACHINES)}; choices: {', '.join(MACHINES)}")
    mesh, microbatches = MACHINES[machine]
    return to_config_dict(
        RunConfig(
            model=ModelConfig(
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
                remat="full",  # our choice: what fits, with few microbatches
                attention="fused",  # stated: FlashAttention
            ),
            stages=(
                StageConfig(
                    name="16B",
                    steps=52_000,  # stated: 52,000 x 2304 x 2048 = 245.37B tokens
                    batch_size=2304,  # stated
                    microbatches=microbatches,  # our choice
                    learning_rate=4e-4,  # stated, searched on the proxy
                    final_learning_rate=6e-6,  # stated: cosine to 6e-6
                    warmup_steps=2000,  # stated: 4,608,000 samples
                    schedule="cosine",  # stated
                ),
            ),
            data=DataConfig(
                mixture="flm_c4",  # English : Chinese 53.5 : 46.5, stated; its sources are our choice
                vocabulary="cl100k",
                end_id=1432,  # our choice: three line breaks; no id of the 100,256 is free
            ),
            mesh=mesh,
            checkpoint=CheckpointConfig(every=250, keep=3),  # our choice, like what follows
            log_every=10,
            evaluate_every=1000,
            evaluation_rows=2304,
        )
    )
