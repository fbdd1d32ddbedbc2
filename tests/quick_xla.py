"""Options with which XLA compiles quickly for the CPU, for programs that run once."""

from importlib.metadata import version

QUICK_XLA = "--xla_backend_optimization_level=0"
if version("jax") < "0.11":  # a step compiles in a quarter of the time; jaxlib 0.12 refuses what it no longer has
    QUICK_XLA += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
