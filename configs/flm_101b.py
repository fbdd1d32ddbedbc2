"""FLM-101B: one run that grows, 16B -> 51B -> 101B, on 311.5B tokens (arXiv 2309.03852).

What it reproduces: the paper's schedule (table 2), block, vocabulary and hyper-parameters. Of each number the comment
says whether the paper states it, it is derived from what the paper states, or it is our choice: the structures of 16B
and 51B are not published. The text is the paper's English and Chinese mixture in kind, not in its documents.

Machines, 2048 tokens a row; memory and days by `flmjax plan --config=configs/flm_101b.py:MACHINE`, at most:
        a800     192 A800 80 GB (24 nodes of 8)    53 GiB a device    20 days (the paper: 21.5)
        tpu_v5p  256 chips, 4x8x8                  24 GiB             12 days
        tpu_v4   256 chips, 4x8x8                  16 GiB             20 days
        tpu_v6e  256 chips, 16x16                  16 GiB              8 days

Launch on every host, with the same workdir on a file system that all hosts see:
        flmjax train --config=configs/flm_101b.py:a800 --workdir=/shared/flm_101b
"""

from flmjax.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    GrowthConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
    nearest,
    to_config_dict,
)

# (mesh, microbatches of the stages). Few and large microbatches: each one gathers all weights twice. Tensor parallelism
# stays inside a node. Over fsdp 64 a shard has 160 rows of 10240, ten whole tiles of a TPU, and 88 of 5632, five and a
# half: a third of 16B's gradients are reduced whole there. 2 x 32 x 4 scatters them, takes 1.3 GiB more and as long.
MACHINES = {
    "a800": (MeshConfig(replica=3, fsdp=16, tensor=4, topology="a800:24x8"), (3, 3, 3)),
    "tpu_v5p": (MeshConfig(replica=1, fsdp=64, tensor=4, topology="v5p:4x8x8"), (3, 3, 3)),
    "tpu_v4": (MeshConfig(replica=1, fsdp=64, tensor=4, topology="v4:4x8x8"), (9, 9, 9)),
    "tpu_v6e": (MeshConfig(replica=1, fsdp=64, tensor=4, topology="v6e:16x16"), (9, 9, 9)),
}
STAGE = {"final_learning_rate": 6e-6, "schedule": "cosine"}  # stated: cosine to 6e-6
OWN = GrowthConfig("zero", rate_policy="stage")  # exact, as the paper's operators; each stage has a schedule, stated


def get_config(machine: str = "a800"):
    """The run on one of MACHINES."""
    if machine not in MACHINES:
        raise ConfigError(f"flm_101b.py:{machine}{nearest(machine, MACHINES)}; choices: {', '.join(MACHINES)}")
    mesh, microbatches = MACHINES[machine]
    # Stated: 6,000 steps of 2160. A TPU slice's 64 data shards do not divide 2160: the same tokens in 5,625 of 2304.
    batch, steps, warmup = (2160, 6_000, 107) if machine == "a800" else (2304, 5_625, 100)
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
                    steps=52_000,  # stated, like batch, rate and warm-up of every stage
                    batch_size=2304,
                    microbatches=microbatches[0],
                    learning_rate=4e-4,
                    warmup_steps=2000,  # 4,608,000 samples
                    **STAGE,
                ),
                StageConfig(
                    name="51B",
                    steps=8_400,
                    batch_size=2304,
                    microbatches=microbatches[1],
                    learning_rate=3.4e-4,
                    warmup_steps=100,  # 230,400 samples
                    growth=OWN,
                    embed_dim=10_240,  # our choice: 51B has 101B's width
                    num_heads=80,
                    mlp_dim=40_960,
                    **STAGE,
                ),
                StageConfig(
                    name="101B",
                    steps=steps,
                    batch_size=batch,
                    microbatches=microbatches[2],
                    learning_rate=2e-4,
                    warmup_steps=warmup,  # 230,400 samples
                    growth=OWN,
                    num_layers=80,  # stated, with width 10240 and 80 heads
                    **STAGE,
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
            certificate_rows=192,
        )
    )
