"""The proxy of FLM-101B's search for rate, deviation and temperature (muP): the 16B at width 256.

What it reproduces: one run of the search in arXiv 2309.03852: width 256, 2 heads, depth and all else as 16B, 57.3M
parameters (the paper: below 100M), 24.6 hours on 6 nodes of 8 A800. The values below are the result of the search;
muP carries them to 16B, whose base_embed_dim is this width. How many steps a run of the search had is not published.
Of each number the comment says whether the paper states it, it is derived, or it is our choice.

Devices: 48 A800 80 GB (6 nodes of 8), each with all parameters; 2.5 GiB a device by `flmjax plan`; a day: 52,000 steps
in the paper's 24.6 hours are 32 TFLOP/s of a device. The plan says 6 hours: it takes matrices 256 wide to be as fast as
large ones.

Price of the search: a run takes 48 x 24.6 = 1,181 device-hours, 1.4% of the 82,030 that flm_101b.py:a800 takes by
`flmjax plan`. The paper does not state its grid. Ours, 3 rates x 3 deviations x 3 temperatures, has 27 points: 664
hours one after another on the 6 nodes, 31,882 device-hours, 39% of the run. One value changed at a time has 7 points:
172 hours, 8,266 device-hours, 10% of the run. `flmjax plan --cost-only --config=configs/flm_proxy.py --tflops=32`
prices a point with other steps, for example `--config.stages[0].steps=5200`.

Launch, one run for each point of a grid:
        flmjax train --config=configs/flm_proxy.py --workdir=/shared/proxy_a
        flmjax train --config=configs/flm_proxy.py --config.stages[0].learning_rate=2e-4 --workdir=/shared/proxy_b
and so on with --config.model.init_std and --config.model.softmax_temperature.
"""

from flmjax.config import (
    CheckpointConfig,
    DataConfig,
    MeshConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
    choose_words,
    to_config_dict,
)

MODEL = ModelConfig(
    num_layers=40,  # that of our 16B: stated that they are equal
    embed_dim=256,  # stated
    num_heads=2,  # stated
    head_dim=128,  # 256 / 2, that of 16B
    mlp_dim=1024,  # 4 x 256
    vocab_size=100_256,  # stated, like all that follows in flm_101b.py with the same mark
    max_length=2048,  # stated
    norm="layernorm",  # derived
    activation="gelu",  # derived
    position="xpos",  # stated
    bias=True,  # derived
    tied_embedding=True,  # derived
    base_embed_dim=256,  # stated: the width itself, m = 1
    init_std=1.6e-2,  # stated: result of the search
    softmax_temperature=2.0,  # stated: result of the search
    dtype="bfloat16",  # stated
    remat="full",  # our choice
    attention="fused",  # stated: FlashAttention
)


def get_config(argument: str = ""):
    """The run; this file knows no word of an argument."""
    choose_words(argument)
    return to_config_dict(
        RunConfig(
            model=MODEL,
            stages=(
                StageConfig(
                    name="proxy",
                    steps=52_000,  # our choice, 16B's: compared at the same step on the same data
                    batch_size=2304,  # that of 16B, 48 sequences a device
                    microbatches=6,  # our choice: 8 sequences a device
                    learning_rate=4e-4,  # stated: result of the search
                    final_learning_rate=6e-6,  # that of 16B, like the next two
                    warmup_steps=2000,
                    schedule="cosine",
                ),
            ),
            data=DataConfig(
                mixture="flm_c4",  # English : Chinese 53.5 : 46.5, stated; its sources are our choice
                vocabulary="cl100k",
                end_id=1432,  # our choice: three line breaks; no id of the 100,256 is free
            ),
            mesh=MeshConfig(replica=48, fsdp=1, tensor=1, topology="a800:6x8"),  # stated: 6 nodes
            checkpoint=CheckpointConfig(every=1000, keep=1),  # our choice, like what follows
            log_every=10,
            evaluate_every=1000,
            evaluation_rows=2304,
        )
    )
