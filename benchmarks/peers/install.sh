#!/usr/bin/env bash
# Make an environment for each of the other servers: benchmarks/peers/install.sh FOLDER
set -euo pipefail
folder=${1:?expected the folder for the environments}
mkdir -p "$folder"
for peer in kserve mlserver litserve bentoml mosec nvidia-pytriton; do
    python3 -m venv "$folder/$peer"
    "$folder/$peer/bin/pip" install --quiet "$peer" onnxruntime
done
# MLServer runs on uvloop where there is one.
"$folder/mlserver/bin/pip" install --quiet uvloop
