"""Tele-FLM 52B (arXiv 2404.16645), and its growth to 102B (arXiv 2407.02783).

What it reproduces: the first stage is Tele-FLM's structure and hyper-parameters on 2T tokens: FLM with RMSNorm, SwiGLU,
RoPE, no biases and an untied output head. The second stage has the sizes of its 102B. Of each number the comment
says whether it is stated (paper or model card), derived, our choice, or recalled: from memory of the two papers, not
read in them. Not reproduced: the papers grow with masks and a choice of layers (MSG), this run with the exact operator
"zero" and our schedule; their data is not public; 1T, the third size, is left out.

Rates, deviations and multipliers stand as they were applied at 8192 wide, after the search on a proxy of 64 layers and
512: 3.125e-2 = 0.5 / 16, and both 0.5 and 16 = 8192 / 512 stand in the released configuration. So base_embed_dim stays
None, the standard parametrisation: with 512 this code would divide by 16 a second time.

Devices: 896 A800 80 GB (112 nodes of 8, recalled); by `flmjax plan` 26 GiB a device and 54 days for 52B, 43 GiB and 15
days for 102B, 47 GiB while it grows.
Launch on every host, with the same workdir on a file system that all hosts see:
        flmjax train --config=configs/tele_flm_52b.py --workdir=/shared/tele_flm --config.data.vocabulary=FILE.model
        flmjax train --config=configs/tele_flm_52b.py:52b ...  (the first stage alone)
"""

from flmjax.config import (
    CheckpointConfig,
    DataConfig,
    GrowthConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    StageConfig,
    choose_words,
    to_config_dict,
)

MODEL = ModelConfig(
    num_layers=64,  # stated, like all of the structure
    embed_dim=8192,
    num_heads=64,
    head_dim=128,  # derived: 8192 / 64
    mlp_dim=21_824,
    vocab_size=80_000,
    max_length=4096,
    norm="rmsnorm",
    norm_eps=1e-5,
    activation="swiglu",
    position="rope",
    rope_theta=10_000.0,
    bias=False,
    tied_embedding=False,
    embedding_multiplier=1.0,
    output_multiplier=3.125e-2,
    init_std=4e-3,  # stated; matrices 4.242e-3, also stated: this code has one deviation, off by 6 %
    dtype="bfloat16",  # recalled
    remat="full",  # our choice: what fits, with few microbatches
    attention="fused",  # our choice
)


def get_config(argument: str = ""):
    """The run; the argument "52b" leaves out the growth to 102B."""
    first_stage_alone = choose_words(argument, stage=("52b",))["stage"]
    small = StageConfig(
        name="52B",
        steps=363_300,  # derived: 2.0T tokens (the model card: about 2T) / 5,505,024
        batch_size=1344,  # derived: 5,505,024 tokens, stated, / 4096
        microbatches=1,  # our choice: 6 sequences a data shard
        learning_rate=1.5e-4,  # stated; the same for matrices, recalled
        final_learning_rate=1.5e-5,  # stated
        warmup_steps=2000,  # stated
        schedule="cosine",  # recalled
    )
    large = StageConfig(
        name="102B",
        steps=54_500,  # derived: 0.3T / 5,505,024; the 1T model's card says about 2.3T in all, 2.0T are 52B's
        batch_size=1344,  # our choice, like all that follows but the sizes
        microbatches=1,
        learning_rate=1.2e-4,  # 1.5e-4 x 8192 / 10240, as muP scales a matrix
        final_learning_rate=1.2e-5,
        warmup_steps=500,
        schedule="cosine",
        growth=GrowthConfig("zero", rate_policy="stage"),
        num_layers=80,  # recalled, like the next three
        embed_dim=10_240,
        num_heads=80,
        mlp_dim=27_264,
    )
    return to_config_dict(
        RunConfig(
            model=MODEL,
            stages=(small,) if first_stage_alone else (small, large),
            optimizer=OptimizerConfig(weight_decay=0.0),  # stated; betas 0.9 and 0.95 and clipping at 1.0 recalled
            data=DataConfig(
                mixture="flm_c4",  # our choice: English and Chinese; Tele-FLM's mixture is not public
                # Your SentencePiece model with 80,000 ids, its end-of-sentence piece among them: no such file comes
                # with this code. Before the first step the run compares its size with vocab_size.
                vocabulary="tele_flm.model",
            ),
            mesh=MeshConfig(replica=14, fsdp=16, tensor=4, topology="a800:112x8"),  # our choice; 1344 = 6 x 14 x 16
            checkpoint=CheckpointConfig(every=250, keep=3),  # our choice, like what follows
            log_every=10,
            evaluate_every=1000,
            evaluation_rows=1344,
            certificate_rows=224,
        )
    )
