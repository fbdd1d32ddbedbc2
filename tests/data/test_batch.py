"""A batch holds what `Batch` says: on the host, on the devices, and as abstract shapes."""

import jax
import numpy as np
import pytest

from flmjax.config import ConfigError, DataConfig, ModelConfig, RunConfig
from flmjax.data.batch import Batch, BatchKind, abstract_batch, global_batch
from flmjax.data.loader import TrainingStream
from flmjax.data.prepare import prepare
from flmjax.data.prepared import with_vocabulary
from flmjax.data.sources.documents import Document

LENGTH = 32
KINDS = {
    "text": (DataConfig(), BatchKind(segments=False, teachers=False)),
    "documents": (DataConfig(document_attention=True), BatchKind(segments=True, teachers=False)),
    "teachers": (DataConfig(teachers=("t",)), BatchKind(segments=True, teachers=True)),
    "teachers, documents": (
        DataConfig(teachers=("t",), document_attention=True),
        BatchKind(segments=True, teachers=True),
    ),
}


def stream(directory, data: DataConfig) -> TrainingStream:
    fields = {**vars(data), "sources": ("a",), "vocabulary": "bytes", "validation_fraction": 0.2}
    data = DataConfig(**fields)
    sources = {"a": [f"text {i:05d}" for i in range(200)]}
    if data.teachers:
        sources["t"] = [Document(f"proposition {i}?", f"{i // 2}", i % 2 == 0) for i in range(100)]
    prepared = prepare(data, directory, sources=sources)
    return TrainingStream.of_run(RunConfig(data=data, model=ModelConfig(max_length=LENGTH)), prepared)


@pytest.fixture
def sharding():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.mark.parametrize("name", KINDS)
def test_abstract_batches_have_the_shapes_of_those_on_devices(name, tmp_path, sharding):
    data, kind = KINDS[name]
    training = stream(tmp_path / "data", data)
    assert BatchKind.of(training.data, training.prepared.marks is not None) == kind
    abstract = abstract_batch(kind, 4, LENGTH, sharding)
    for batch in (next(training.batches(start=0, batch_size=4)), training.validation_rows(2)):
        placed = global_batch({key: array[:4] for key, array in batch.items()}, sharding)
        rows = len(batch["tokens"])
        shapes = {key: (array.shape, array.dtype) for key, array in placed.items()}
        assert shapes == {key: ((rows, *x.shape[1:]), x.dtype) for key, x in abstract.items()}


def test_batch_names_every_entry_and_no_other():
    assert abstract_batch(BatchKind(True, True), 2, 8).keys() == Batch.__annotations__.keys()


@pytest.mark.parametrize(("apart", "teachers"), [(False, False), (True, False), (False, True)])
def test_documents_apart_and_teachers_have_segments(apart, teachers):
    kind = BatchKind.of(DataConfig(document_attention=apart), teachers)
    assert kind == BatchKind(segments=apart or teachers, teachers=teachers)


def test_attention_that_cannot_keep_propositions_apart_is_refused(tmp_path):
    """A seqio mixture has teachers or not; that is known once its data are prepared."""
    prepared = stream(tmp_path / "data", KINDS["teachers"][0]).prepared
    config = RunConfig(model=ModelConfig(attention="cudnn"))
    with pytest.raises(ConfigError, match=r"model\.attention='cudnn' .* has teachers; take 'plain'"):
        with_vocabulary(config, prepared)


@pytest.mark.parametrize("name", KINDS)
def test_bytes_are_those_of_weighted_targets_of_text(name, tmp_path):
    """Ids below 256 are bytes; a proposition's text is not in the loss."""
    batch = stream(tmp_path / "data", KINDS[name][0]).validation_rows(100)
    is_text = ~batch["marks"].any(axis=1) if "marks" in batch else np.ones(len(batch["tokens"]), bool)
    by_hand = ((batch["targets"] < 256) * batch["weights"]).sum(axis=1) * is_text
    assert batch["bytes"].tolist() == by_hand.tolist()
    assert 0 < batch["bytes"].max() < LENGTH
