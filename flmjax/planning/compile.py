"""The programs of a run, compiled ahead of time for another machine: nothing is allocated or executed."""

import dataclasses
import math
import os
import re
import time
from typing import Any

import jax
import numpy as np

from flmjax.config import ConfigError, DataConfig, MeshShape, RunConfig, Stage
from flmjax.config.validate import legal_microbatches, stage_mesh
from flmjax.data.batch import BatchKind, abstract_batch
from flmjax.evaluation.validation_loss import jit_source_sums
from flmjax.growth.comparison import jit_comparison
from flmjax.growth.growth import Growth
from flmjax.growth.ramp import ramp_of
from flmjax.model.attention import choose
from flmjax.planning.exchanges import Schedule, collectives_of
from flmjax.planning.hlo import Module
from flmjax.planning.products import MatrixProducts
from flmjax.planning.program import Program
from flmjax.planning.topology import PACKAGES, TooLargeError, Topology, devices_of
from flmjax.sharding.mesh import check_slices, make_mesh
from flmjax.sharding.rules import Placement, batch_sharding, whole_rows
from flmjax.stderr import captured_stderr
from flmjax.training.state import StateSpec, state_spec
from flmjax.training.step import jit_growth, jit_stage_step

MORE_DEVICES = "take more devices along fsdp or tensor"


class Compiler:
    """Compiles the stages of a config for a topology.

    Attributes:
        config: of the run, with its vocabulary size.
        topology: the machine.
        is_exact: False where the machine's compiler is missing. Programs are then compiled for as many fake CPU
            devices: their partitioning is that of the machine, their bytes and times are not.
        batch_kind: optional entries of the batches of training.
        assumptions: remarks on what could not be known about the data.
    """

    def __init__(self, config: RunConfig, topology: Topology):
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu would query the cloud for its location,
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # and admit one process a machine, which no compiler needs
        jax.config.update("jax_platforms", "cpu")
        self.config = config
        self.topology = topology
        teachers, self.assumptions = teachers_of(config.data)
        self.batch_kind = BatchKind.of(config.data, teachers)
        with captured_stderr():  # backends report the devices that this machine lacks
            devices = devices_of(topology)
            self.is_exact = devices is not None
            if devices is None:
                jax.config.update("jax_num_cpu_devices", topology.num_devices)
            cpu_devices = jax.devices()
        self.devices = cpu_devices if devices is None else devices

    def mesh_shape(self, stage: Stage) -> MeshShape:
        """Devices along each mesh axis of a stage; raises ConfigError for a mesh that does not fit the machine."""
        mesh = stage_mesh(self.config, stage, self.topology.num_devices)
        check_slices(mesh, self.topology.slices, stage.setting_of("mesh"))
        return mesh

    def spec(self, stage: Stage) -> StateSpec:
        """The abstract training state of a stage."""
        return state_spec(stage.model, self.config.optimizer, make_mesh(self.mesh_shape(stage), self.devices))

    def step(self, stage: Stage) -> Program:
        """The training step of a stage, the program of `flmjax train`.

        Raises:
            TooLargeError: from a compiler that makes no program that does not fit (the TPU's).
            ConfigError: for any other error of the compiler.
        """
        spec, size = self.spec(stage), stage.config.batch_size
        batch = abstract_batch(self.batch_kind, size, stage.model.max_length, batch_sharding(spec.mesh))
        skips_spikes = self.config.spike.action == "skip"
        scalars = [np.float32(0)] * (2 if skips_spikes else 1)
        return compile_program(
            jit_stage_step(spec, stage.layout, ramp_of(stage), skips_spikes),
            (spec.abstract, batch, *scalars),
            self.topology,
            name=f"stages[{stage.index}] ({stage.name})",
            advice=self._step_advice(stage),
        )

    def evaluation(self, stage: Stage) -> Program:
        """The program of an evaluation on a stage's microbatch; raises as `step`.

        The moments are in memory beside it and are counted as arguments.
        """
        spec, rows = self.spec(stage), stage.config.batch_size // stage.layout.microbatches
        sharding = batch_sharding(spec.mesh)
        batch = abstract_batch(self.batch_kind, rows, stage.model.max_length, sharding)
        sources = jax.ShapeDtypeStruct((rows,), np.int32, sharding=sharding)
        program = compile_program(
            jit_source_sums(stage.model, spec.mesh, self.config.data.num_sources or 1),
            (spec.abstract.params, batch, sources),
            self.topology,
            name=f"the evaluation of stages[{stage.index}] ({stage.name})",
            advice=self._microbatch_advice(stage),
        )
        return _beside(program, spec.abstract.opt_state)

    def _step_advice(self, stage: Stage) -> str:
        if stage.layout.remat != "full":
            return f"take {stage.setting_of('remat')}='full'"
        return self._microbatch_advice(stage)

    def _microbatch_advice(self, stage: Stage) -> str:
        counts = legal_microbatches(stage.config, self.mesh_shape(stage).data_shards)
        more = [count for count in counts if count > stage.layout.microbatches]
        return f"take stages[{stage.index}].microbatches={more[0]}" if more else MORE_DEVICES

    def attention(self, stage: Stage) -> str:
        """The attention backend of a stage's step."""
        if stage.layout.attention != "fused":
            return stage.layout.attention
        platform = self.devices[0].platform
        return choose(platform, stage.model.dtype, self.batch_kind.segments, stage.model.max_length)

    def growth(self, stage: Stage) -> Program:
        """The growth from the previous stage into `stage`; raises as `step`."""
        assert stage.previous is not None
        old, new = self.spec(stage.previous), self.spec(stage)
        key = jax.eval_shape(lambda: jax.random.key(0))
        return compile_program(
            jit_growth(old, new, Growth.into(stage)),
            (old.abstract, key),
            self.topology,
            name=f"growth {stage.previous.name} -> {stage.name}",
            advice=MORE_DEVICES,
        )

    def certificate(self, stage: Stage) -> Program:
        """The largest program of the certificate of the growth into `stage`: both models' gradients; raises as `step`.

        The moments of both states are in memory beside it and are counted as arguments.
        """
        assert stage.previous is not None
        old, new = self.spec(stage.previous), self.spec(stage)
        rows = whole_rows(self.config.certificate_rows, old.mesh, new.mesh)
        batch = abstract_batch(self.batch_kind, rows, old.config.max_length, batch_sharding(new.mesh))
        program = compile_program(
            jit_comparison(
                Growth.into(stage), new.config.dtype, (Placement(old.mesh), Placement(new.mesh)), gradients=True
            ),
            ((old.abstract.params, new.abstract.params), batch),
            self.topology,
            name=f"the certificate of growth {stage.previous.name} -> {stage.name}",
            advice=MORE_DEVICES,  # certificate_rows decides the number of parts that are compared, not their size
        )
        return _beside(program, (old.abstract.opt_state, new.abstract.opt_state))


def _beside(program: Program, arrays: Any) -> Program:
    """The program with abstract arrays that are in memory beside it counted as its arguments."""
    size = bytes_of_device(arrays)
    return dataclasses.replace(program, arguments=program.arguments + size, peak=program.peak + size)


def bytes_of_device(arrays: Any) -> int:
    """Bytes of one device's shards of a tree of abstract arrays."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def teachers_of(data: DataConfig) -> tuple[bool, tuple[str, ...]]:
    """(Whether batches of training hold sequences of teachers, remarks where that is an assumption).

    A seqio mixture is opened, which imports TensorFlow; no data set is read.

    Raises:
        ConfigError: for a mixture that is not registered.
    """
    if data.mixture is None:
        return bool(data.teachers), ()
    try:
        from flmjax.data.sources.seqio_mixture import has_judgements  # not at the top: 5 s
    except ConfigError as error:
        unknown = str(error)
    else:
        judged = has_judgements(data)
        if judged is not None:
            return judged, ()
        unknown = f"data.mixture='{data.mixture}': only its data set can tell whether it has judgements"
    return False, (f"{unknown}; the plan assumes text without teachers",)


def compile_program(program: Any, arguments: tuple[Any, ...], topology: Topology, name: str, advice: str) -> Program:
    """Compile a jitted function for the abstract arguments, whose shardings name the devices.

    Args:
        program: the jitted function.
        arguments: jax.ShapeDtypeStructs with shardings.
        topology: the machine of the devices.
        name, advice: of the Program.

    Raises:
        TooLargeError: from a compiler that makes no program that does not fit (the TPU's).
        ConfigError: for any other error of the compiler.
    """
    start = time.perf_counter()
    with captured_stderr() as stderr_text:
        try:
            compiled = program.lower(*arguments).compile()
        except (RuntimeError, ValueError) as error:
            raise _explained(error, topology, name, advice) from error
        seconds = time.perf_counter() - start
        warnings = stderr_text()
    memory = compiled.memory_analysis()
    sizes = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
    }
    total = sizes["arguments"] + sizes["outputs"] - sizes["aliased"] + sizes["temporaries"]
    try:
        products = MatrixProducts(Module(compiled.as_text()))
        schedule = Schedule(products, topology.node_size)
        matmul_flops, timelines = products.flops(), schedule.timelines()
    except ValueError as error:
        raise ConfigError(f"{name} cannot be priced: {error}") from error
    return Program(
        name=name,
        advice=advice,
        **sizes,
        peak=memory.peak_memory_in_bytes or total,
        matmul_flops=matmul_flops,
        attention_products=schedule.attention_products(),
        collectives=tuple(collectives_of(timelines)),
        timelines=tuple(timelines),
        rematerialisations=len(re.findall("Involuntary full rematerialization", warnings)),
        compile_seconds=seconds,
    )


def _explained(error: Exception, topology: Topology, name: str, advice: str) -> ConfigError | TooLargeError:
    text = " ".join(str(error).split())
    if "cuDNN not found" in text:
        return ConfigError(f"cuDNN is missing: pip install '{PACKAGES['cuda']}', or model.attention='plain'")
    if sizes := re.search(r"RESOURCE_EXHAUSTED.*?\(([\d.]+[GMT])\) exceeds available HBM.*?\(([\d.]+[GMT])\)", text):
        return TooLargeError(
            f"{name} needs {sizes[1]}iB a device, of {sizes[2]}iB, says the compiler of {topology.name}: {advice}"
        )
    return ConfigError(f"{topology.name}: its compiler failed: {text[:300]}")
