"""Launch files: a config, the machine of its mesh.topology and the settings of a site, filled into a template."""

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Callable

import jinja2

from flmjax.config import ConfigError, RunConfig, nearest
from flmjax.config.validate import validate_meshes
from flmjax.config.values import local_path
from flmjax.launch.site import GkeJobset, Site, Slurm, TpuVm, Xpk, read_site
from flmjax.planning.topology import Topology, parse_topology

# Stands in the first two lines of every launch file; only a file that has it is overwritten.
MARK = "# A launch file, written by: "


@dataclasses.dataclass(frozen=True)
class TpuName:
    """Google's names of a TPU family.

    Attributes:
        cloud: value of --type of gcloud; None: Cloud TPU has no such machines.
        gke: value of the node selector cloud.google.com/gke-tpu-accelerator.
        gke_machine: machine type of a node pool, without the number of chips of a node.
        xpk: first part of --tpu-type.
    """

    cloud: str | None
    gke: str
    gke_machine: str
    xpk: str


TPU_NAMES = {
    "v4": TpuName("v4", "tpu-v4-podslice", "ct4p-hightpu", "v4"),
    "v5e": TpuName("v5litepod", "tpu-v5-lite-podslice", "ct5lp-hightpu", "v5litepod"),
    "v5p": TpuName("v5p", "tpu-v5p-slice", "ct5p-hightpu", "v5p"),
    "v6e": TpuName("v6e", "tpu-v6e-slice", "ct6e-standard", "v6e"),
    "v7x": TpuName(None, "tpu7x", "tpu7x-standard", "tpu7x"),
}


@dataclasses.dataclass(frozen=True)
class Machine:
    """The hosts of a run.

    Attributes:
        topology: the machine that mesh.topology names.
        family, shape: the two parts of mesh.topology: "a800" and "24x8", "v5p" and "4x8x8".
        hosts: number of hosts; for TPUs, of one slice.
        chips: GPUs or TPU chips of one host.
    """

    topology: Topology
    family: str
    shape: str
    hosts: int
    chips: int

    @property
    def description(self) -> str:
        """One line for the header of the launch file."""
        if self.topology.platform == "cuda":
            return f"{self.hosts} nodes of {self.chips} {self.topology.chip.kind} GPUs"
        slices = "1 slice" if self.topology.slices == 1 else f"{self.topology.slices} slices"
        return f"{slices} of {self.hosts * self.chips} {self.family} chips; hosts of a slice: {self.hosts}"


@dataclasses.dataclass(frozen=True)
class TrainCommand:
    """The command that a launch file starts on every host.

    Attributes:
        flags: flags of `flmjax train` that make the config.
        workdir: the folder as every host sees it, or its URL.
    """

    flags: tuple[str, ...]
    workdir: str

    @property
    def line(self) -> str:
        """The command line, quoted for a shell."""
        return shlex.join(["flmjax", "train", *self.flags, f"--workdir={self.workdir}"])

    @property
    def name(self) -> str:
        """The workdir's last folder as a name for Slurm, Kubernetes and Google Cloud: at most 40 of a-z, 0-9 and -."""
        words = re.findall(r"[a-z0-9]+", self.workdir.lower().rpartition("://")[2].strip("/").rpartition("/")[2])
        name = "-".join(words)
        return (name if name[:1].isalpha() else f"run-{name}")[:40].strip("-")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of launch file.

    Attributes:
        template: name of its file in flmjax/launch/templates.
        platform: platform of the machines: "cuda" or "tpu".
        needs: site settings that must not be empty.
        next_command: command that starts the run, with {} in place of the launch file.
    """

    template: str
    platform: str
    needs: tuple[str, ...]
    next_command: str


KINDS = {
    "slurm": Kind("slurm.sbatch", "cuda", (), "sbatch {}"),
    "tpu_vm": Kind("tpu_vm.sh", "tpu", ("zone", "runtime_version"), "bash {}"),
    "gke_jobset": Kind("gke_jobset.yaml", "tpu", ("image",), "kubectl apply -f {}"),
    "xpk": Kind("xpk.sh", "tpu", ("cluster", "image"), "bash {}"),
}


def check_kind(word: str) -> str:
    """The name of a kind of launch file.

    Raises:
        ConfigError: for another word, with the nearest names.
    """
    if word not in KINDS:
        raise ConfigError(f"unknown kind of launch file '{word}'{nearest(word, KINDS)}")
    return word


def write_launch_file(kind: str, config: RunConfig, command: TrainCommand, site_file: str | None, output: str) -> str:
    """Write a launch file.

    Args:
        kind: a name of KINDS.
        site_file: value of --site; None: the defaults.
        output: path of the launch file; an older launch file there is replaced.

    Returns:
        The command that starts the run.

    Raises:
        ConfigError: for a machine that the kind does not start, site settings that are missing or wrong, and an output
            that is another file.
    """
    text = launch_file(kind, config, command, site_file)
    path = local_path(output, "--output")
    if path.is_dir():
        raise ConfigError(f"--output={output} is a folder; name a file")
    if path.exists() and not any(line.startswith(MARK) for line in path.read_text(errors="replace").splitlines()[:2]):
        raise ConfigError(f"--output={output} exists and is no launch file; name another")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return KINDS[kind].next_command.format(shlex.quote(str(path)))


def launch_file(kind: str, config: RunConfig, command: TrainCommand, site_file: str | None) -> str:
    """The text of a launch file; arguments and errors are those of write_launch_file."""
    machine, site = _machine(kind, config), read_site(site_file)
    for text in (*command.flags, command.workdir):
        if not text.isprintable():
            raise ConfigError(f"{text!r} cannot stand in a launch file: it has characters that are not printable")
    settings = _settings(kind, site, site_file)
    is_url = "://" in command.workdir
    if KINDS[kind].platform == "tpu" and not is_url:
        raise ConfigError(
            f"--workdir={command.workdir} is lost with the hosts of a slice; name a folder of a bucket: "
            "gs://BUCKET/FOLDER"
        )
    if not is_url:  # ~ stays ~ in quotes
        command = dataclasses.replace(command, workdir=str(local_path(command.workdir, "--workdir")))
    written_by = ["flmjax", "launch", kind, *command.flags, f"--workdir={command.workdir}"]
    written_by += [f"--site={site_file}"] if site_file else []
    template = _templates().get_template(KINDS[kind].template)
    return template.render(
        mark=MARK + shlex.join(written_by),
        machine=machine,
        command=command,
        is_url=is_url,
        env={name: value for name, value in site.env.items() if value},
        site=site,
        settings=settings,
        tpu=TPU_NAMES.get(machine.family),
    )


def _settings(kind: str, site: Site, site_file: str | None) -> Slurm | TpuVm | GkeJobset | Xpk:
    """The site's settings of one kind of launch file.

    Raises:
        ConfigError: for settings that are missing.
    """
    settings = getattr(site, kind)
    if missing := [f"{kind}.{name}" for name in KINDS[kind].needs if not getattr(settings, name)]:
        where = site_file or "a copy of flmjax/launch/site.toml, and name it: --site=COPY"
        raise ConfigError(f"'{kind}' needs {' and '.join(missing)}; set them in {where}")
    if kind == "tpu_vm" and not site.setup:
        raise ConfigError(
            f"'tpu_vm' needs setup: a new slice has neither flmjax nor the config file; {site_file} is to install them"
        )
    if kind == "slurm" and bool(settings.container) != bool(settings.image):
        raise ConfigError(f"slurm.container and slurm.image must both be set or both be empty in {site_file}")
    return settings


def _machine(kind: str, config: RunConfig) -> Machine:
    """The hosts of the config's machine; raises ConfigError for a machine of another platform than the kind's."""
    topology = parse_topology(config.mesh.topology)
    names = {"cuda": "GPUs", "tpu": "TPUs"}
    platform = KINDS[kind].platform
    if topology.platform != platform:
        others = [name for name, other in KINDS.items() if other.platform == topology.platform]
        raise ConfigError(
            f"mesh.topology='{topology.name}' has {names[topology.platform]}, and '{kind}' starts {names[platform]}; "
            f"take {' or '.join(others)}"
        )
    family, _, shape = topology.name.partition("*")[0].partition(":")
    if kind == "tpu_vm" and TPU_NAMES[family].cloud is None:
        raise ConfigError(f"mesh.topology='{topology.name}': Cloud TPU has no virtual machines of {family}; take xpk")
    meshes = validate_meshes(config, topology.num_devices)
    if topology.slices > 1:
        from flmjax.sharding.mesh import check_slices  # not at the top: one slice needs no JAX

        for stage, mesh in zip(config.schedule, meshes, strict=True):
            check_slices(mesh, topology.slices, stage.setting_of("mesh"))
    sizes = [int(size) for size in shape.split("x")]
    if platform == "cuda":
        return Machine(topology, family, shape, *sizes)
    # A host of a slice has 4 chips; a slice of fewer is one host, and so is one of 2x4 on Cloud TPU.
    chips = 8 if kind == "tpu_vm" and shape == "2x4" else min(4, math.prod(sizes))
    return Machine(topology, family, shape, math.prod(sizes) // chips, chips)


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flmjax.launch"),
        autoescape=False,  # shell and YAML are quoted by the filters
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters: dict[str, Callable[[str], str]] = {"shell": shlex.quote, "yaml": json.dumps}
    environment.filters.update(filters)
    return environment
