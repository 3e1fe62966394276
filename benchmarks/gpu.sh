#!/usr/bin/env bash
# All that needs an NVIDIA GPU, in one call: benchmarks/gpu.sh OUT, with the environment's bin folder on the PATH.
# FOLDER=cifar10 in the environment adds the evidence in full, which takes hours and goes on where it stopped.
# Plans of `tensorrt` want one more package than `make setup` installs: .venv/bin/pip install --editable '.[tensorrt]'.
# ONNX Runtime's own provider "tensorrt" wants the TensorRT that it was built for, which its error names. What is not
# installed is printed as skipped, or as not measured, with the reason; nothing here downloads anything.
set -uo pipefail
out=$(realpath -m "${1:?expected the folder for the results}")
[ -z "${FOLDER:-}" ] || FOLDER=$(realpath "$FOLDER")
cd "$(dirname "$0")/.."
mkdir -p "$out"
failed=0
{
    date --iso-8601
    git rev-parse HEAD
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
    python -m pip list | grep -iE '^(torch|onnx|tensorrt|cuda|nvidia)'
} > "$out/machine.txt" 2>&1
python -m pytest -m gpu -p no:cacheprovider 2>&1 | tee "$out/tests.txt" || failed=1
python benchmarks/tenet_cost.py --device cuda --out "$out/tenet_cost.png" 2>&1 | tee "$out/tenet_cost.txt" || failed=1
for network in resnet20 resnet50; do
    python benchmarks/engines.py --device cuda --network "$network" 2>&1 | tee "$out/engines_$network.txt" || failed=1
done
python benchmarks/export_time.py --phases 2>&1 | tee "$out/export_time.txt" || failed=1
if [ -n "${FOLDER:-}" ]; then
    python benchmarks/tenet_evidence.py --folder "$FOLDER" --out "$out/evidence" --size full --device cuda \
        2>&1 | tee "$out/tenet_evidence.txt" || failed=1
fi
exit "$failed"
