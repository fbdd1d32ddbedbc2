"""Four ways to one model of 2.7M parameters, on equal tokens: the strategies of figure 1 of FLM-101B, small.

What it reproduces: the figure's four areas (arXiv 2309.03852): a model that never grows; one that grows in equal steps
over equal tokens, which saves half if its first model is almost nothing; one that saves less; one that saves more, as
FLM-101B.
Every number is our choice. The columns at the right: the share of the FLOPs of "none" that a strategy saves at equal
tokens, 983,040, and its final validation loss with one seed (nats a token):
        none         6 x 192 (layers x width) for 480 updates of 2,048 tokens                  0.0 %   1.787
        linear       five sizes in equal steps of parameters, 96 updates each                 46.9 %   1.935
        moderate     3 x 96, 3 x 192, 6 x 192 for 96, 192 and 192 updates                     36.9 %   1.834
        aggressive   the same sizes for 380, 60 and 40 updates, FLM-101B's shares of tokens   74.1 %   1.992
Equal tokens are not equal losses: a run as short as this one loses by late growth, as the four reports show.

Launch, one run for each strategy, the argument; the second command prints the savings and trains nothing:
        flmjax train --config=configs/growth_strategies.py:aggressive --workdir=runs/growth_aggressive
        flmjax plan --config=configs/growth_strategies.py:aggressive --config.mesh.fsdp=1 --cost-only --tflops=0.05
Devices: a CPU; on 2 cores some 7 minutes for none and 4 for aggressive. Needs flmjax[data] for the Chinese sentences;
--config.data.sources=python_docs does without.
"""

from flmjax.config import (
    CheckpointConfig,
    DataConfig,
    GrowthConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
    choose_words,
    to_config_dict,
)

FINAL = (6, 192, 768)  # layers, width, width of the MLP
# (steps, sizes) of the stages. "linear": 0.12M, 0.76M, 1.43M, 2.09M, 2.72M parameters; the MLP's width evens the steps.
STRATEGIES = {
    "none": ((480, FINAL),),
    "linear": (
        (96, (2, 64, 256)),
        (96, (4, 128, 448)),
        (96, (5, 160, 544)),
        (96, (5, 192, 672)),
        (96, FINAL),
    ),
    "moderate": ((96, (3, 96, 384)), (192, (3, 192, 768)), (192, FINAL)),
    "aggressive": ((380, (3, 96, 384)), (60, (3, 192, 768)), (40, FINAL)),
}
# One schedule from the first step to the last, whatever grows: the same rates at the same tokens in all four.
SCHEDULE = {"learning_rate": 2e-3, "final_learning_rate": 1e-4, "warmup_steps": 30}
GROWTH = GrowthConfig("zero", new_warmup_fraction=0.1)  # exact; the rate of new weights rises over a stage's first 10 %
HEAD_DIM = 32  # the same in all sizes: heads are added, none grows


def get_config(argument: str = ""):
    """The run of one of STRATEGIES; without an argument, of "aggressive"."""
    strategy = choose_words(argument, strategy=STRATEGIES)["strategy"] or "aggressive"
    stages = []
    for i, (steps, (layers, width, mlp)) in enumerate(STRATEGIES[strategy]):
        stages.append(
            StageConfig(
                name=f"{layers}x{width}x{mlp}",
                steps=steps,
                batch_size=16,
                num_layers=layers,
                embed_dim=width,
                num_heads=width // HEAD_DIM,
                mlp_dim=mlp,
                **({"growth": GROWTH} if i else SCHEDULE),
            )
        )
    return to_config_dict(
        RunConfig(
            model=ModelConfig(
                head_dim=HEAD_DIM,
                vocab_size=257,  # bytes and the end of a document: with it the savings can be computed before a run
                max_length=128,
                activation="gelu_tanh",
                scan_unroll=4,
            ),
            stages=tuple(stages),
            data=DataConfig(sources=("python_docs", "hsk"), vocabulary="bytes"),
            checkpoint=CheckpointConfig(every=100, keep=2),
        )
    )
