"""The options that every session of ONNX Runtime has here, whatever it is for: engines, calibration, trial runs.

threads, whether to optimise --session_options--> SessionOptions --InferenceSession
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import onnxruntime

from export.engines.threads import budget

# ONNX Runtime's log severity "error": its warnings about graph details are no business of a caller's.
_LOG_ERRORS = 3

# Features of x86 processors that multiply U8 and S8 into 32 bits.
_EXACT = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


def saturates(*, machine: str, flags: frozenset[str]) -> bool:
    """Return whether a processor's products of U8 and S8 saturate at 16 bits, as those of x86 without VNNI do.

    Such a machine would answer otherwise than one with VNNI on which an engine was proved, so that its sessions take
    slower and exact products. With VNNI those would make int8 three to four times slower, for nothing
    (benchmarks/engines.py).
    """
    return machine in {"x86_64", "AMD64"} and not flags & _EXACT


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """Return the processor's features as Linux names them; none where it does not say."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.is_file() else []
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def session_options(threads: int | None = None, *, optimise: bool = True) -> onnxruntime.SessionOptions:
    """Return options under which a graph answers the same on every machine, and beside neighbours.

    Args:
        threads: that one call may use; all that this process may use if None.
        optimise: whether ONNX Runtime may fuse nodes; without, each tensor of the graph is computed as it stands there
            and freed as soon as it has been used.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = budget() if threads is None else threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _LOG_ERRORS
    # Threads that spin for work starve their neighbours on shared cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if saturates(machine=platform.machine(), flags=_cpu_flags()):
        options.add_session_config_entry("session.x64quantprecision", "1")
    # Of fp16 vision transformers it makes nodes that the CPU provider has no kernel for: a crash of the process in
    # 1.31. Nothing in a file's name says that it is fp16, so it is off for all of them.
    options.add_session_config_entry("optimization.disable_specified_optimizers", "MatmulTransposeFusion")
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        # In the order of the graph. By default what the outputs are computed from is put off to the end of the run,
        # and every activation of the graph is held until then: 2.2 GB instead of 0.1 for eight images of a ResNet-50.
        options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    return options
