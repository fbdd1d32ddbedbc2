"""XLA_FLAGS for tests on a CPU: compilation takes a quarter of the time, and programs run slower."""

from importlib.metadata import version

QUICK_XLA = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):  # jaxlib 0.12 has no other emitters, and refuses the flag
    QUICK_XLA += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
