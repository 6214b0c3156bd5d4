import { existsSync } from "node:fs";
import { setTimeout as delay } from "node:timers/promises";
import { createLogger } from "../observability/index.ts";
import { systemClock } from "../std/index.ts";
import { ClusterView } from "./cluster-view.ts";
import type { CommandContext } from "./commands.ts";
import { defaultDiscoveryFolder } from "./options.ts";
import { buildDiscovery, buildEventPlane } from "./planes.ts";
import { resolveOptions } from "./resolve-options.ts";
import { leftOut, statusText } from "./status-table.ts";

/** A worker repeats its load every two seconds; a little more, and what is missing stays missing. */
const LOAD_WAIT_MS = 2_500;
const REDRAW_MS = 500;

/** `dynamo status`: one table (`--once`, or when nobody watches), or one that follows the cluster until Ctrl-C. */
export async function run({ argv, env, out, err }: CommandContext): Promise<number> {
  const resolved = await resolveOptions({ command: "status", argv, env });
  const { values } = resolved;
  const folder = values["file-kv"] ?? defaultDiscoveryFolder();
  if (!existsSync(folder)) {
    err(`dynamo status: no discovery folder ${folder}; name the cluster's with --file-kv (dynamo local prints it)\n`);
    return 1;
  }
  const logger = createLogger({
    level: values.log === "info" ? "warn" : values.log,
    format: values["logging-console-format"],
    fields: { role: "status" },
  });
  const discovery = await buildDiscovery(values, systemClock, logger);
  const events = await buildEventPlane(values, discovery, systemClock, logger);
  const view = new ClusterView();
  const leave = new AbortController();
  const onSignal = (): void => leave.abort();
  process.on("SIGINT", onSignal).on("SIGTERM", onSignal);
  try {
    await view.open(discovery, events, values.namespace);
    const where = `namespace ${values.namespace} in ${folder}`;
    const show = (): string =>
      values.json
        ? `${JSON.stringify({ namespace: values.namespace, folder, instances: view.instances(), left_out: leftOut(view.instances()) })}\n`
        : statusText(view.instances(), where, Date.now());
    if (values.once || values.json || process.stdout.isTTY !== true) {
      await complete(view, leave.signal);
      out(show());
    } else await follow(() => out(`\u001b[H\u001b[2J${show()}\nCtrl-C to leave\n`), leave.signal);
    return 0;
  } finally {
    process.off("SIGINT", onSignal).off("SIGTERM", onSignal);
    await view.close();
    await events.close();
    await discovery.close();
  }
}

async function complete(view: ClusterView, signal: AbortSignal): Promise<void> {
  const timeout = AbortSignal.any([signal, AbortSignal.timeout(LOAD_WAIT_MS)]);
  const { promise, resolve } = Promise.withResolvers<void>();
  view.onChange = () => {
    if (view.isComplete) resolve();
  };
  view.onChange();
  if (timeout.aborted) return;
  timeout.addEventListener("abort", () => resolve(), { once: true });
  await promise;
  view.onChange = undefined;
}

/** Redraws by time, not by change: a busy cluster would flicker. */
async function follow(draw: () => void, signal: AbortSignal): Promise<void> {
  while (!signal.aborted) {
    draw();
    await delay(REDRAW_MS, undefined, { signal }).catch(() => undefined);
  }
}
