"""eFLM: an FLM that continues its training with teacher signals beside text (FLM-101B, sections 2.2 and 4.3).

What it reproduces: the paper continues from its 16B stage and reports MMLU 27.02 -> 44.50 and C-Eval 27.0 -> 46.1. The
task data, their share, steps and rate are not published; they are our choice. A teacher's sequences are propositions
that end in a mark, one of two emoji, and the loss is on the mark alone; every batch has some of them.

Launch, two commands: the first copies the newest checkpoint of a 16B run, `--config=configs/flm_101b.py:16b` (equal
sizes: nothing grows), the second trains on. The texts come from TFDS (C4, mC4 and SuperGLUE prepared in
~/tensorflow_datasets).
        flmjax grow --config=configs/eflm_16b.py --source=runs/flm_16b --workdir=runs/eflm_16b
        flmjax train --config=configs/eflm_16b.py --workdir=runs/eflm_16b
Devices: 192 of 80 GB. 2304 x 2048 = 4.72M tokens an update, 1,000 updates 4.72B: 4.5 hours at the paper's 162 TFLOP/s.

Arguments, both for minutes on 2 cores; they need flmjax[data]. The teacher asks: is a Chinese sentence for beginners or
for advanced learners?
`cpu`, the twin of the run above, continues the twin of 16B:
        flmjax train --config=configs/flm_101b.py:cpu,16b --workdir=runs/flm_16b_cpu
        flmjax grow --config=configs/eflm_16b.py:cpu --source=runs/flm_16b_cpu --workdir=runs/eflm_cpu
        flmjax train --config=configs/eflm_16b.py:cpu --workdir=runs/eflm_cpu
`scratch` trains 0.7M parameters from random weights, with pieces in place of bytes:
        flmjax train --config=configs/eflm_16b.py:scratch --workdir=runs/eflm_scratch
Judgement accuracy on held-out sentences is 50 % (chance) for some 250 steps and ends near 77 %.
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


def get_config(argument: str = ""):
    """The run of 16B; the arguments "cpu" and "scratch" are small runs of minutes."""
    runs = {None: _full, "cpu": _twin, "scratch": _from_scratch}
    return to_config_dict(runs[choose_words(argument, size=("cpu", "scratch"))["size"]]())


def _full() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_layers=40,  # this and the next four: our choice, the paper does not publish the structure of 16B
            embed_dim=5632,
            num_heads=44,
            head_dim=128,
            mlp_dim=22_528,  # 4 x 5632
            vocab_size=100_256,  # stated, like the length: cl100k without its control tokens
            max_length=2048,
            base_embed_dim=256,  # stated
            init_std=1.6e-2,  # stated
            softmax_temperature=2.0,  # stated; that logits are divided by it is derived
            dtype="bfloat16",
            remat="full",
            attention="plain",  # each proposition is a document: cuDNN cannot keep documents apart
        ),
        stages=(
            StageConfig(
                name="eflm",
                steps=1_000,
                batch_size=2304,  # stated for the 16B stage
                microbatches=3,
                learning_rate=4e-5,  # a tenth of the stage's first
                final_learning_rate=6e-6,
                warmup_steps=50,
            ),
        ),
        data=DataConfig(
            mixture="eflm_c4",
            vocabulary="cl100k",
            end_id=1432,  # that of flm_101b.py: three line breaks
        ),
        mesh=MeshConfig(replica=3, fsdp=32, tensor=2),  # 2 tensor x 96 data of the paper's 16B stage
        checkpoint=CheckpointConfig(every=100),
    )


def _twin() -> RunConfig:
    """The run on one CPU: the model of `flm_101b.py:cpu,16b`, whose rates are ten times the large run's."""
    return RunConfig(
        model=ModelConfig(
            num_layers=2,
            embed_dim=88,
            num_heads=11,
            head_dim=8,
            mlp_dim=352,
            vocab_size=257,  # bytes and the end of a document
            max_length=128,
            base_embed_dim=88,
            init_std=1.6e-2,
            softmax_temperature=2.0,
            scan_unroll=4,
        ),
        stages=(
            StageConfig(
                name="eflm",
                steps=200,
                batch_size=24,
                learning_rate=4e-4,
                final_learning_rate=6e-5,
                warmup_steps=10,
            ),
        ),
        data=DataConfig(
            sources=("python_docs", "hsk"),
            teachers=("hsk_levels",),
            mixture_weights=(0.45, 0.45, 0.1),
            vocabulary="bytes",
        ),
        evaluate_every=50,
        checkpoint=CheckpointConfig(every=100),
    )


def _from_scratch() -> RunConfig:
    return RunConfig(
        model=ModelConfig(
            num_layers=2,
            embed_dim=128,
            num_heads=4,
            head_dim=32,
            mlp_dim=512,
            max_length=128,
            activation="gelu_tanh",
            scan_unroll=4,
        ),
        stages=(
            StageConfig(
                name="eflm",
                steps=1000,
                batch_size=16,
                learning_rate=3e-3,
                final_learning_rate=1e-4,
                warmup_steps=50,
            ),
        ),
        data=DataConfig(
            sources=("python_docs", "hsk"),
            teachers=("hsk_levels",),
            mixture_weights=(0.25, 0.25, 0.5),
            vocab_size=2048,
            teacher_weight=4.0,
        ),
        evaluation_rows=128,
        checkpoint=CheckpointConfig(every=200, keep=2),
    )
