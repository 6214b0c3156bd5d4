import { get } from "node:http";
import { setTimeout as delay } from "node:timers/promises";

/** Between two looks; a look costs the frontend well under a millisecond. */
const POLL_MS = 20;

/** Resolves when `GET /v1/models` names the model; rejects with the signal's reason. */
export async function waitUntilListed(address: string, model: string, signal: AbortSignal): Promise<void> {
  for (;;) {
    signal.throwIfAborted();
    if ((await listedModels(address, signal)).includes(model)) return;
    await delay(POLL_MS, undefined, { signal });
  }
}

/** Empty while the frontend does not answer: it may be restarting. */
function listedModels(address: string, signal: AbortSignal): Promise<string[]> {
  return new Promise((resolve) => {
    const request = get(`${address}/v1/models`, { signal, timeout: 2_000 }, (response) => {
      let text = "";
      response.setEncoding("utf8").on("data", (chunk: string) => (text += chunk));
      response.on("error", () => resolve([]));
      response.on("end", () => resolve(response.statusCode === 200 ? names(text) : []));
    });
    request.on("timeout", () => request.destroy());
    request.on("error", () => resolve([]));
  });
}

function names(text: string): string[] {
  const { data } = JSON.parse(text) as { data: { id: string }[] };
  return data.map(({ id }) => id);
}
