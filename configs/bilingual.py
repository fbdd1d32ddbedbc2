"""FLM-101B's mixture of data, from your files: English to Chinese 53.5 : 46.5, instructions mixed in.

What it reproduces: the shares and the vocabulary (cl100k) of FLM-101B, section 2; the authors' texts are not
published. The argument is a folder with four sources, searched for the files that the README lists, .txt, .md, .jsonl
and others, plain or compressed:
    en/, zh/: text. Files of the same name in both are translations: both train or both are held out.
    en_instructions/, zh_instructions/: JSON lines with "text" (as OIG's) or "instruction", "input", "output" (COIG's).
The model is the paper's proxy (width 256, 2 heads, depth as 16B): try the mixture on it first.

Launch: flmjax prepare --config=configs/bilingual.py:FOLDER --inspect=3 --workdir=runs/bilingual
        flmjax train --config=configs/bilingual.py:FOLDER --workdir=runs/bilingual
Needs flmjax[data]; one GPU of 24 GB is enough. With TFDS in place of files: --config.data.mixture=flm_c4
--config.data.mixture_weights=None (C4 and mC4).
"""

from flmjax.config import DataConfig, ModelConfig, RunConfig, StageConfig, to_config_dict

ENGLISH = 0.535  # stated
INSTRUCTIONS = 0.02  # of each language; our choice, the paper says that there are some


def get_config(folder: str = "data"):
    """The run on the texts in `folder`."""
    shares = [language * part for part in (1 - INSTRUCTIONS, INSTRUCTIONS) for language in (ENGLISH, 1 - ENGLISH)]
    return to_config_dict(
        RunConfig(
            model=ModelConfig(
                num_layers=40,
                embed_dim=256,
                num_heads=2,
                head_dim=128,
                mlp_dim=1024,  # 4 x 256
                max_length=2048,
                base_embed_dim=256,
                dtype="bfloat16",
                remat="full",
            ),
            stages=(
                StageConfig(
                    name="proxy",
                    steps=10_000,
                    batch_size=32,
                    learning_rate=4e-4,
                    final_learning_rate=6e-6,
                    warmup_steps=400,
                ),
            ),
            data=DataConfig(
                sources=tuple(f"{folder}/{name}" for name in ("en", "zh", "en_instructions", "zh_instructions")),
                mixture_weights=tuple(round(share, 6) for share in shares),
                vocabulary="cl100k",
                split_by="path",
                validation_fraction=0.01,
            ),
        )
    )
