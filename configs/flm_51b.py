"""FLM-51B from scratch: a control for the second stage of FLM-101B. The paper never trained 51B from scratch.

What it is for: the paper's 51B grows out of 16B after 245.37B tokens. This run gives the same model the steps, batch
and rates of that stage (table 2 of arXiv 2309.03852) and random weights instead, 39.64B tokens in all: what the 16B
hands on through the growth is the distance between the two losses. 39.64B tokens are few for 51B. Of each number the
comment says whether the paper states it, it is derived from what the paper states, or it is our choice.

Machines, 2048 tokens a row; memory and days by `flmjax plan --config=configs/flm_51b.py:MACHINE`, at most:
        a800     192 A800 80 GB (24 nodes of 8)    30 GiB a device     5 days (the paper's stage: 5.37)
        tpu_v5p  256 chips, 4x8x8                  14 GiB              3 days
        tpu_v4   256 chips, 4x8x8                   9 GiB              5 days
        tpu_v6e  256 chips, 16x16                   9 GiB              2 days

Launch on every host, with the same workdir on a file system that all hosts see:
        flmjax train --config=configs/flm_51b.py:a800 --workdir=/shared/flm_51b
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

# (mesh, microbatches), those of the stage in flm_101b.py: equal speed, so that days compare too.
MACHINES = {
    "a800": (MeshConfig(replica=3, fsdp=16, tensor=4, topology="a800:24x8"), 3),
    "tpu_v5p": (MeshConfig(replica=1, fsdp=64, tensor=4, topology="v5p:4x8x8"), 3),
    "tpu_v4": (MeshConfig(replica=1, fsdp=64, tensor=4, topology="v4:4x8x8"), 9),
    "tpu_v6e": (MeshConfig(replica=1, fsdp=64, tensor=4, topology="v6e:16x16"), 9),
}


def get_config(machine: str = "a800"):
    """The run on one of MACHINES."""
    if machine not in MACHINES:
        raise ConfigError(f"flm_51b.py:{machine}{nearest(machine, MACHINES)}; choices: {', '.join(MACHINES)}")
    mesh, microbatches = MACHINES[machine]
    return to_config_dict(
        RunConfig(
            model=ModelConfig(
                num_layers=40,  # our choice, like the next two: 51B of the paper's several possible shapes
                embed_dim=10_240,
                num_heads=80,
                head_dim=128,  # stated for 101B: 10240 / 80
                mlp_dim=40_960,  # 4 x 10240, GPT-3's
                vocab_size=100_256,  # stated: cl100k without its control tokens
                max_length=2048,  # stated
                norm="layernorm",  # derived: what Tele-FLM's paper lists as changed from FLM
                norm_eps=1e-5 * 5632 / 10_240,  # derived: what 1e-5 of 16B becomes when the width grows
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
                    name="51B",
                    steps=8_400,  # stated for the grown stage, like all of this stage: 8,400 x 2304 x 2048 = 39.64B
                    batch_size=2304,
                    microbatches=microbatches,  # our choice
                    learning_rate=3.4e-4,
                    final_learning_rate=6e-6,  # cosine to 6e-6
                    warmup_steps=100,  # 230,400 samples; random weights may want more, at the price of the comparison
                    schedule="cosine",
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
