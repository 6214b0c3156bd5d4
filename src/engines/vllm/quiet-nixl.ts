import { mkdirSync, readFileSync, renameSync, writeFileSync } from "node:fs";
import { tmpdir, userInfo } from "node:os";
import { join } from "node:path";

/**
 * NIXL's Python wrapper starts a thread that polls without a pause: every idle server takes a core. The library has the
 * setting, the wrapper none. A module of that name on PYTHONPATH is what Python itself looks for at its start; it changes the
 * one value, in the servers that a worker starts, and is left out with `--nixl-poll-pause-us 0`.
 */
export function quietNixlFolder(): string {
  const folder = join(tmpdir(), `dynamo-ts-engines-${userInfo().uid}`, "python");
  const path = join(folder, "sitecustomize.py");
  mkdirSync(folder, { recursive: true, mode: 0o700 });
  if (read(path) === SITE) return folder;
  // Whole or not at all: another worker's server may be reading it.
  const fresh = `${path}.${process.pid}`;
  writeFileSync(fresh, SITE, { mode: 0o600 });
  renameSync(fresh, path);
  return folder;
}

/** Of the server's environment: how long the thread waits, microseconds. */
export const NIXL_PAUSE_VARIABLE = "DYN_NIXL_POLL_PAUSE_US";

function read(path: string): string | undefined {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return undefined;
  }
}

const SITE = `# Set by the worker that started this server (DYN_NIXL_POLL_PAUSE_US): NIXL's Python wrapper has its polling thread look
# without a pause, which takes a core of each server that has nothing to do. Nothing else is changed, and nothing installed.
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))


def _pause():
    try:
        return int(os.environ.get("DYN_NIXL_POLL_PAUSE_US", "0"))
    except ValueError:
        return 0


class _Loader(importlib.abc.Loader):
    def __init__(self, inner):
        self._inner = inner

    def create_module(self, spec):
        return self._inner.create_module(spec)

    def exec_module(self, module):
        self._inner.exec_module(module)
        base = getattr(module, "nixlAgentConfig", None)
        if base is None:
            return

        class nixlAgentConfig(base):
            def __setattr__(self, name, value):
                super().__setattr__(name, _pause() if name == "pthrDelay" and value == 0 else value)

        module.nixlAgentConfig = nixlAgentConfig


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        package, _, last = name.rpartition(".")
        if last != "_bindings" or not package.startswith("nixl"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


if _pause() > 0:
    sys.meta_path.insert(0, _Finder())

# One of the user's own comes after this one.
for _folder in sys.path:
    _path = os.path.join(_folder or ".", "sitecustomize.py")
    if os.path.abspath(os.path.dirname(_path)) != _HERE and os.path.exists(_path):
        _spec = importlib.util.spec_from_file_location("sitecustomize", _path)
        _spec.loader.exec_module(importlib.util.module_from_spec(_spec))
        break
`;
