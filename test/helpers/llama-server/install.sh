#!/usr/bin/env bash
# Installs a real llama.cpp server for the tests, without compiling: the xllamacpp wheel from PyPI has it inside. Into
# ~/.cache/dynamo-ts/llama-server or the folder named; does nothing when that version is there already. About 110 MB.
set -euo pipefail
version=2026.10.11549
here="$(cd "$(dirname "$0")" && pwd)"
folder="${1:-$HOME/.cache/dynamo-ts/llama-server}"
if [ ! -e "$folder/$version" ]; then
  rm -rf "$folder"
  python3 -m venv "$folder/venv"
  "$folder/venv/bin/pip" install --quiet --disable-pip-version-check --only-binary :all: "xllamacpp==$version"
fi
mkdir -p "$folder/bin"
cp "$here/llama-server.py" "$folder/llama-server.py"
printf '#!/bin/sh\nexec "%s" "%s" "$@"\n' "$folder/venv/bin/python" "$folder/llama-server.py" > "$folder/bin/llama-server"
chmod +x "$folder/bin/llama-server"
touch "$folder/$version"
echo "$folder/bin/llama-server"
