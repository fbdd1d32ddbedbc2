"""A batch holds what `Batch` says: on the host, on the devices, and as abstract shapes."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flmjax.config import ConfigError, DataConfig, MeshShape, ModelConfig, RunConfig, StageConfig
from flmjax.data.batch import Batch, BatchKind, abstract_batch, data_host, global_batch, split_over_devices
from flmjax.data.loader import TrainingStream
from flmjax.data.prepare import prepare
from flmjax.data.prepared import with_vocabulary
from flmjax.data.sources.documents import Document
from flmjax.sharding.mesh import make_mesh
from flmjax.sharding.rules import batch_sharding

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
    with pytest.raises(ConfigError, match=r"model\.attention='cudnn' .* the teacher data in .*: take 'plain'"):
        with_vocabulary(config, prepared)
    of_stage = RunConfig(stages=(StageConfig(attention="cudnn"),))
    with pytest.raises(ConfigError, match=r"stages\[0\]\.attention='cudnn' .* the teacher data in .*: take 'plain'"):
        with_vocabulary(of_stage, prepared)


@pytest.mark.parametrize("name", KINDS)
def test_bytes_are_those_of_weighted_targets_of_text(name, tmp_path):
    """Ids below 256 are bytes; a proposition's text is not in the loss."""
    batch = stream(tmp_path / "data", KINDS[name][0]).validation_rows(100)
    is_text = ~batch["marks"].any(axis=1) if "marks" in batch else np.ones(len(batch["tokens"]), bool)
    by_hand = ((batch["targets"] < 256) * batch["weights"]).sum(axis=1) * is_text
    assert batch["bytes"].tolist() == by_hand.tolist()
    assert 0 < batch["bytes"].max() < LENGTH


# ---- rows by data shard ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "device_range", "host"),
    [
        ((1, 8, 1), range(8), {"host": 0, "hosts": 1}),
        ((2, 2, 2), range(4, 8), {"host": 1, "hosts": 2}),
        ((1, 2, 4), range(4), {"host": 0, "hosts": 2}),
        ((1, 1, 8), range(4, 8), {"host": 0, "hosts": 1}),  # tensor over both processes: the same sequences
        ((1, 2, 4), range(2, 4), {"host": 0, "hosts": 2}),
        ((4, 1, 2), range(6, 7), {"host": 3, "hosts": 4}),
    ],
)
def test_a_process_reads_the_sequences_of_its_data_shards(shape, device_range, host):
    """With tensor over several processes each read other sequences, and replicas of a batch differed."""
    sharding = batch_sharding(make_mesh(MeshShape(*shape), jax.devices()))
    devices = [jax.devices()[i] for i in device_range]
    slices = {device: sharding.devices_indices_map((16,))[device] for device in devices}
    process = SimpleNamespace(addressable_devices_indices_map=lambda rows: slices)
    assert data_host(process, 16) == host
    rows = np.arange(16).reshape(host["hosts"], -1)[host["host"]]
    assert {i for index in slices.values() for i in np.arange(16)[index]} == set(rows)


def test_arrays_that_every_process_holds_are_split():
    mesh = make_mesh(MeshShape(2, 2, 2), jax.devices())
    x = np.arange(24).reshape(8, 3)
    (placed,) = split_over_devices([x], batch_sharding(mesh))
    assert placed.sharding == NamedSharding(mesh, PartitionSpec(("replica", "fsdp")))
    np.testing.assert_array_equal(placed, x)
