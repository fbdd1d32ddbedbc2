"""Programs of a run, compiled ahead of time for a machine that is not here: nothing is allocated, nothing runs."""

import dataclasses
import math
import os
import re
import time
from typing import Any

import jax
import numpy as np

from flmjax.config import ConfigError, MeshConfig, RunConfig
from flmjax.config.validate import validate_mesh
from flmjax.data.batch import abstract_batch
from flmjax.data.loader import batch_kind
from flmjax.growth.certificate import jit_comparison
from flmjax.growth.growth import Growth
from flmjax.growth.ramp import ramp_of
from flmjax.model.attention import choose
from flmjax.optimizer.schedule import new_warmup
from flmjax.planning.hlo import Collective, collectives, matmul_flops
from flmjax.planning.topology import PACKAGES, TooLargeError, Topology, devices_of
from flmjax.sharding.mesh import make_mesh
from flmjax.sharding.rules import Placement, batch_sharding, whole_rows
from flmjax.stderr import captured_stderr
from flmjax.training.state import StateSpec, state_spec
from flmjax.training.step import jit_growth, jit_train_step


@dataclasses.dataclass(frozen=True)
class Program:
    """What a compiled program says of itself: bytes and FLOPs are those of one device.

    Attributes:
        arguments, outputs, aliased, temporaries: bytes; outputs that take their argument's place are aliased.
        peak: most bytes at once, as the compiler counts them.
        matmul_flops: executed in matrix products, recomputed ones too.
        rematerialisations: "involuntary" ones that the partitioner warned of: arrays gathered whole to be cut anew.
        compile_seconds: lowering included.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int
    matmul_flops: float
    collectives: tuple[Collective, ...]
    rematerialisations: int
    compile_seconds: float


class Compiler:
    """Compiles a config's programs for its mesh.topology.

    Attributes:
        mesh_config: resolved.
        is_exact: False where the machine's compiler is missing, and as many fake CPU devices take its place: programs
            are partitioned the same way, but bytes and memory are not those of the machine.
    """

    def __init__(self, config: RunConfig, topology: Topology):
        """Raises ConfigError for a mesh that does not fit the machine or the config."""
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu would ask the cloud where it is,
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # and let one process of a machine in: for its chips, not ours
        jax.config.update("jax_platforms", "cpu")
        self.config = config
        self.topology = topology
        self.mesh_config: MeshConfig = validate_mesh(config, topology.num_devices)
        with captured_stderr():  # backends say which devices are not here
            devices = devices_of(topology)
            self.is_exact = devices is not None
            if devices is None:
                jax.config.update("jax_num_cpu_devices", topology.num_devices)
            here = jax.devices()
        self.mesh = make_mesh(self.mesh_config, here if devices is None else devices)

    def spec(self, index: int) -> StateSpec:
        """The state of a stage."""
        return state_spec(self.config.stage_models[index], self.config.optimizer, self.mesh)

    def step(self, index: int) -> Program:
        """The training step of a stage, as `flmjax train` makes it."""
        config, stage = self.config, self.config.stages[index]
        spec = self.spec(index)
        batch = abstract_batch(
            batch_kind(config.data), stage.batch_size, spec.config.max_length, batch_sharding(self.mesh)
        )
        program = jit_train_step(spec, stage.microbatches, new_warmup(stage), ramp_of(config.schedule[index]))
        return self._compiled(program, spec.abstract, batch, np.float32(0))

    def attention(self, index: int) -> str:
        """The attention backend of a stage's step."""
        model, data = self.config.stage_models[index], self.config.data
        if model.attention != "fused":
            return model.attention
        platform = self.mesh.devices.flat[0].platform
        return choose(platform, model.dtype, batch_kind(data).segments)

    def growth(self, index: int) -> Program:
        """The growth into a stage from the one before it."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        old, new = self.spec(index - 1), self.spec(index)
        return self._compiled(jit_growth(old, new, self.config.stages[index].growth), old.abstract, key)

    def certificate(self, index: int) -> Program:
        """The larger program of a growth's certificate, both models' gradients; both states' moments are in memory."""
        config, old, new = self.config, self.spec(index - 1), self.spec(index)
        program = jit_comparison(
            Growth.into(config.schedule[index]),
            dtype=new.config.dtype,
            placement=Placement(self.mesh),
            gradients=True,
        )
        rows = whole_rows(config.certificate_rows, self.mesh)
        batch = abstract_batch(batch_kind(config.data), rows, old.config.max_length, batch_sharding(self.mesh))
        found = self._compiled(program, (old.abstract.params, new.abstract.params), batch)
        moments = sum(
            math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
            for x in jax.tree.leaves((old.abstract.opt_state, new.abstract.opt_state))
        )
        return dataclasses.replace(found, arguments=found.arguments + moments, peak=found.peak + moments)

    def _compiled(self, program: Any, *arguments: Any) -> Program:
        start = time.perf_counter()
        with captured_stderr() as said:
            try:
                compiled = program.lower(*arguments).compile()
            except (RuntimeError, ValueError) as error:
                raise _explained(error, self.topology) from error
            seconds = time.perf_counter() - start
            warnings = said()
        memory, text = compiled.memory_analysis(), compiled.as_text()
        parts = {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "aliased": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        }
        whole = parts["arguments"] + parts["outputs"] - parts["aliased"] + parts["temporaries"]
        return Program(
            **parts,
            peak=memory.peak_memory_in_bytes or whole,
            matmul_flops=matmul_flops(text),
            collectives=tuple(collectives(text, self.topology.node)),
            rematerialisations=len(re.findall("Involuntary full rematerialization", warnings)),
            compile_seconds=seconds,
        )


def _explained(error: Exception, topology: Topology) -> ConfigError | TooLargeError:
    text = " ".join(str(error).split())
    if "cuDNN not found" in text:
        return ConfigError(f"cuDNN is missing: pip install '{PACKAGES['cuda']}', or model.attention='plain'")
    if found := re.search(r"RESOURCE_EXHAUSTED.*?\(([\d.]+[GMT])\) exceeds available HBM.*?\(([\d.]+[GMT])\)", text):
        return TooLargeError(f"needs {found[1]}iB a device, of {found[2]}iB, says the compiler of {topology.name}")
    return ConfigError(f"{topology.name}: its compiler failed: {text[:300]}")
