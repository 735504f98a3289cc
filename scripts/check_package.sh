#!/usr/bin/env bash
# Check that a wheel or an sdist alone, in a new environment outside the repository, can ask, serve and train:
#   scripts/check_package.sh dist/vidlada-….whl [options of pip install, e.g. --constraint constraints.txt]
set -euo pipefail
[[ $# -ge 1 && -f $1 ]] || { echo "usage: scripts/check_package.sh WHEEL_OR_SDIST [options of pip install]" >&2; exit 2; }
repository=$(cd "$(dirname "$0")/.." && pwd)
package=$(realpath "$1")
shift
folder=$(mktemp -d)
server=
trap 'rm -rf "$folder"; [[ -z $server ]] || kill "$server"' EXIT

"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "$@" "$package[serve,train]"
vidlada="$folder/venv/bin/vidlada"
cp "$repository/examples/shapes.mp4" "$folder"
cd "$folder"

"$vidlada" ask shapes.mp4 "how many things are in the video ?"
"$vidlada" train tiny --output run --dry-run
"$folder/venv/bin/python" - <<'PYTHON'  # the first steps of it
from pathlib import Path
import yaml
from vidlada.training.config import config_path
values = yaml.safe_load(config_path("tiny").read_text())
stage = {**values["stages"][0], "steps": 3}
Path("short.yaml").write_text(yaml.safe_dump({**values, "stages": [stage], "warmup_steps": 1}))
PYTHON
"$vidlada" ask shapes.mp4 "is it red ?" --gen-length 8 --model "$("$vidlada" train short.yaml --output run)"

"$vidlada" serve --port 0 2>serve.log &
server=$!
for _ in $(seq 120); do
    grep -q "http://" serve.log && break
    sleep 1
done
url=$(grep -o "http://[^ ]*" serve.log | head -n 1)
"$folder/venv/bin/python" - "$url" <<'PYTHON'
import json, sys, urllib.request
body = {"model": "tiny", "gen_length": 16, "messages": [{"role": "user", "content": "is it red ?"}]}
head = {"Content-Type": "application/json"}
request = urllib.request.Request(sys.argv[1] + "/v1/chat/completions", json.dumps(body).encode(), head)
print(json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"])
PYTHON
echo "$(basename "$package") can ask, train and serve"
