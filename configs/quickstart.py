"""Three stages of growth on real text in minutes on a laptop.

What it does: it trains a small FLM (LayerNorm, GELU, xPos, biases, tied embedding) on the documentation that ships with
the Python interpreter, grows it in width, heads and MLP, trains on, grows it in depth and trains on.

Launch: flmjax train --config=configs/quickstart.py --workdir=runs/quickstart
        flmjax train --config=configs/quickstart.py:bilingual ...  (Chinese-English sentences too; needs flmjax[data])
        flmjax train --config=configs/quickstart.py --config.data.sources=my/folder ...  (any folder of text files)
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

STAGE_RATES = GrowthConfig(rate_policy="stage")  # each stage has a schedule of learning rates


def get_config(argument: str = ""):
    """The run; with the argument "bilingual" it reads Chinese-English sentences too."""
    bilingual = choose_words(argument, texts=("bilingual",))["texts"]
    model = ModelConfig(
        num_layers=2,
        embed_dim=128,
        num_heads=4,
        head_dim=32,
        mlp_dim=512,
        max_length=128,
        activation="gelu_tanh",
        scan_unroll=4,
    )
    small = StageConfig(
        name="small", steps=240, batch_size=16, learning_rate=3e-3, final_learning_rate=1e-3, warmup_steps=30
    )
    wide = StageConfig(
        name="wide",
        steps=110,
        batch_size=16,
        learning_rate=2e-3,
        final_learning_rate=1e-3,
        warmup_steps=10,
        growth=STAGE_RATES,
        embed_dim=192,
        num_heads=6,
        mlp_dim=768,
    )
    deep = StageConfig(
        name="deep",
        steps=110,
        batch_size=16,
        learning_rate=1.5e-3,
        final_learning_rate=1e-4,
        warmup_steps=10,
        growth=STAGE_RATES,
        num_layers=4,
    )
    return to_config_dict(
        RunConfig(
            model=model,
            stages=(small, wide, deep),
            data=DataConfig(sources=("python_docs", "hsk") if bilingual else ("python_docs",), vocab_size=2048),
            checkpoint=CheckpointConfig(every=100, keep=2),
        )
    )
