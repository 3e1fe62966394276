from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from export import requirements
from export.engines.base import CannotRunHere
from export.engines.cuda import Gpu
from export.manifest import Build, Requirements
from export.requirements import Machine
from tests.export.engines import versions

if TYPE_CHECKING:
    from export.manifest import Manifest

ADA = Gpu("Imaginary 4090", "8.9")
HOPPER = Gpu("Imaginary H100", "9.0")
COMMAND = "tenet export --from digits@1 --runtime tensorrt --repository models --name digits-plan"


def machine(**facts: Any) -> Machine:
    usual = {
        "platform": "linux-x86_64",
        "runtimes": {"onnxruntime": "1.31.1", "tensorrt": "11.4.1.5", "tensorrt_rtx": "1.7.1.116"},
        "gpus": (ADA,),
        "driver": "13.0",
    }
    return Machine(**{**usual, **facts})


def plan(**requires: Any) -> Manifest:
    usual = {"runtime": "==11.4.1.5", "platform": "linux-x86_64", "compute_capabilities": ("8.9",), "driver": "13.0"}
    return versions.manifest().model_copy(
        update={
            "file": "model.plan",
            "runtime": "tensorrt",
            "requires": Requirements(**{**usual, **requires}),
            "build": Build(command=COMMAND),
        }
    )


def onnx(specifier: str) -> Manifest:
    return versions.manifest().model_copy(update={"requires": Requirements(runtime=specifier)})


def test_what_a_plan_was_built_for_is_where_it_runs() -> None:
    requirements.check(plan(), machine())
    requirements.check(plan(compute_capabilities=("8.6", "8.9")), machine())
    requirements.check(plan(compute_capabilities=()), machine(gpus=(HOPPER,)))
    requirements.check(plan(driver=None), machine(driver=None))
    requirements.check(plan(), machine(gpus=(HOPPER, ADA)), ordinal=1)


@pytest.mark.parametrize(
    ("facts", "complaint"),
    [
        ({"runtimes": {"tensorrt": "11.5.0.2"}}, r"expected tensorrt ==11\.4\.1\.5, got 11\.5\.0\.2"),
        (
            {"runtimes": {}},
            r"expected tensorrt ==11\.4\.1\.5, and none is installed \(`pip install 'tenet\[tensorrt\]'`",
        ),
        ({"platform": "linux-aarch64"}, "expected platform linux-x86_64, got linux-aarch64"),
        ({"gpus": (HOPPER,)}, r"expected a GPU of compute capability 8\.9, got 9\.0 \(Imaginary H100\)"),
        ({"gpus": (), "driver": None}, "needs an NVIDIA GPU, and CUDA finds none on this machine"),
        ({"driver": "12.8"}, r"expected a driver for CUDA 13\.0 or newer, got 12\.8"),
        ({"driver": None}, r"expected a driver for CUDA 13\.0 or newer, got one that does not say"),
    ],
)
def test_a_plan_for_another_machine_is_refused_with_both_sides_and_the_command(
    facts: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(CannotRunHere, match=rf"linear@1 cannot run here: .*{complaint}") as refusal:
        requirements.check(plan(), machine(**facts))
    assert f"build it again here by `{COMMAND}`" in str(refusal.value)


def test_everything_that_is_missing_is_said_at_once() -> None:
    with pytest.raises(CannotRunHere) as refusal:
        requirements.check(plan(), machine(runtimes={"tensorrt": "10.9"}, gpus=(HOPPER,), driver="12.4"))
    for part in ("got 10.9", "got 9.0", "got 12.4"):
        assert part in str(refusal.value)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(CannotRunHere, match="expected a GPU number from 0 to 0, got 1"):
        requirements.check(plan(), machine(), ordinal=1)


def test_plans_for_newer_gpus_run_on_those_alone() -> None:
    portable = plan(compute_capabilities=("8.0+",))
    for capability in ("8.0", "8.9", "9.0", "10.0", "12.1"):
        requirements.check(portable, machine(gpus=(Gpu("any", capability),)))
    with pytest.raises(CannotRunHere, match=r"expected a GPU of compute capability 8\.0\+, got 7\.5"):
        requirements.check(portable, machine(gpus=(Gpu("old", "7.5"),)))


@pytest.mark.parametrize(
    ("specifier", "version", "meets"),
    [
        ("==11.4.1.5", "11.4.1.5", True),
        ("==11.4.1.5", "11.4.1.5.post1", True),
        ("==11.4.1.5", "11.4.1.5+cu13", True),
        ("==11.4.1.5", "11.4.1.50", False),
        ("==11.4.1.5", "11.4.1", False),
        ("==11.4.1.5", "11.4.1.5rc1", False),
        ("==11.4.1.5", "nonsense", False),
        (">=11.4.1.5,<12", "11.10.0.1", True),
        (">=11.4.1.5,<12", "12.0.0.1", False),
        (">=11.4.1.5,<12", "11.4.1.4", False),
    ],
)
def test_versions_are_compared_as_versions(specifier: str, version: str, *, meets: bool) -> None:
    wanted, here = plan(runtime=specifier), machine(runtimes={"tensorrt": version})
    if meets:
        requirements.check(wanted, here)
        return
    with pytest.raises(CannotRunHere, match=f"expected tensorrt {specifier}, got {re.escape(version)}"):
        requirements.check(wanted, here)


@given(st.lists(st.integers(0, 99), min_size=2, max_size=4), st.lists(st.integers(0, 99), min_size=2, max_size=4))
def test_a_newer_runtime_takes_an_onnx_file_and_an_older_one_does_not(ours: list[int], needed: list[int]) -> None:
    here = machine(runtimes={"onnxruntime": ".".join(map(str, ours))})
    wanted = onnx(">=" + ".".join(map(str, needed)))
    length = max(len(ours), len(needed))
    padded = [[*numbers, *[0] * (length - len(numbers))] for numbers in (ours, needed)]
    if padded[0] >= padded[1]:
        requirements.check(wanted, here)
    else:
        with pytest.raises(CannotRunHere, match="expected onnxruntime >="):
            requirements.check(wanted, here)


def test_an_onnx_file_needs_no_gpu_and_says_what_to_install() -> None:
    requirements.check(onnx(">=1.27"), machine(gpus=(), driver=None))
    with pytest.raises(CannotRunHere, match=r"expected onnxruntime >=1\.99, got 1\.31\.1; install what it needs"):
        requirements.check(onnx(">=1.99"), machine())


@pytest.mark.parametrize("specifier", ["", "11.4", "=11.4", "any", ">=x"])
def test_requirements_that_are_none_are_refused(specifier: str) -> None:
    with pytest.raises(ValueError, match=r"expected versions such as '==11\.4\.1\.5' or '>=1\.27', got"):
        requirements.check(onnx(specifier), machine())


def test_this_machine_is_described_without_importing_its_runtimes() -> None:
    program = (
        "import sys; from export.requirements import Machine; here = Machine.here()\n"
        "print(here.platform, here.runtimes['onnxruntime'], here.gpus, here.driver)\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'tensorrt', 'tensorrt_rtx'} & sys.modules.keys()))"
    )
    # No GPU is visible to the process, even where there is one.
    environment = {"CUDA_VISIBLE_DEVICES": "-1", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    facts, imported = done.stdout.splitlines()
    assert facts.startswith(f"{requirements.platform_name()} {metadata.version('onnxruntime-gpu')} ()")
    assert imported == "[]"
    assert requirements.platform_name().startswith("linux-")


def test_an_onnx_engine_is_checked_without_asking_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", Untouchable("cuda.bindings.runtime"))
    requirements.check(onnx(">=1.27"))


class Untouchable(ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"nobody should have asked for {name}")


def test_the_driver_that_a_runtime_needs_is_that_of_its_major_cuda_version() -> None:
    pytest.importorskip("tensorrt_rtx")
    assert requirements.driver_of("tensorrt_rtx") == "13.0"
    assert requirements.driver_of("onnxruntime") is None


@pytest.mark.gpu
def test_the_gpus_of_this_machine_are_found() -> None:
    here = Machine.here()
    assert here.gpus
    assert all(re.fullmatch(r"[1-9][0-9]*\.[0-9]", gpu.compute_capability) for gpu in here.gpus)
    assert here.driver is not None
    assert re.fullmatch(r"[1-9][0-9]\.[0-9]+", here.driver)
