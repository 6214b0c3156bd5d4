import { constants } from "node:os";
import type { ModelStore, StoredModel } from "../model/index.ts";
import { systemClock } from "../std/index.ts";
import { PullDisplay } from "./progress.ts";

/** Pulls with a bar on stderr. Ctrl-C breaks it off; what was fetched is kept for the next time. */
export async function pullWithProgress(store: ModelStore, name: string): Promise<StoredModel> {
  const { stderr } = process;
  const display = new PullDisplay({
    write: (text) => void stderr.write(text),
    isTerminal: stderr.isTTY === true,
    columns: stderr.columns ?? 80,
    clock: systemClock,
  });
  const abort = new AbortController();
  const onSignal = (): void => abort.abort();
  const signals = Object.keys(constants.signals).filter((name) => ["SIGINT", "SIGTERM", "SIGHUP"].includes(name));
  for (const signal of signals) process.on(signal, onSignal);
  try {
    return await store.pull(name, { signal: abort.signal, onProgress: (progress) => display.update(progress) });
  } finally {
    display.close();
    for (const signal of signals) process.off(signal, onSignal);
  }
}
