"""Four ways to one model of 2.7M parameters, on equal tokens: the strategies of figure 1 of FLM-101B, small.

What it reproduces: the figure's four areas (arXiv 2309.03852): a model that never grows; one that grows in equal steps
over equal tokens, which saves half if it begins with nothing; one that saves less; one that saves more, as FLM-101B.
Every number here is our choice. At the right: what each saves of the FLOPs of "none", at equal tokens, 983,040, and
the validation loss that it ended with, one seed (nats a token):
        none         6 x 192 (layers x width) for 480 updates of 2,048 tokens                  0.0 %   1.787
        linear       five sizes in equal steps of parameters, 96 updates each                 46.9 %   1.935
        moderate     3 x 96, 3 x 192, 6 x 192 for 96, 192 and 192 updates                     36.9 %   1.834
        aggressive   the same sizes for 380, 60 and 40 updates, FLM-101B's shares of tokens   74.1 %   1.992
Equal tokens are not equal losses: so short a run pays for growing late. The reports of the four runs show it.

Launch, one run for each strategy; the second command prints what it saves and trains nothing:
        flmjax train --config=configs/growth_strategies.py:aggressive --workdir=runs/growth_aggressive
        flmjax plan --config=configs/growth_strategies.py:aggressive --config.mesh.fsdp=1 --cost-only --tflops=0.05
Devices: a CPU; on 2 cores some 7 minutes for none and 4 for aggressive. Needs flmjax[data] for the Chinese sentences;
--config.data.sources=python_docs does without.
"""

from flmjax.config import (
    CheckpointConfig,
    ConfigError,
    DataConfig,
    GrowthConfig,
    ModelConfig,
    RunConfig,
    StageConfig,
    nearest,
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


def get_config(strategy: str = "aggressive"):
    """The run of one of STRATEGIES."""
    if strategy not in STRATEGIES:
        raise ConfigError(
            f"growth_strategies.py:{strategy}{nearest(strategy, STRATEGIES)}; choices: {', '.join(STRATEGIES)}"
        )
    stages = []
    for i, (steps, (layers, width, mlp)) in enumerate(STRATEGIES[strategy]):
        own = {"growth": GROWTH} if i else SCHEDULE
        stages.append(
            StageConfig(
                name=f"{layers}x{width}x{mlp}",
                steps=steps,
                batch_size=16,
                num_layers=layers,
                embed_dim=width,
                num_heads=width // HEAD_DIM,
                mlp_dim=mlp,
                **own,
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
