import { GENERATE_ENDPOINT, type KvTierUse, type TransferPairReport } from "../protocol/index.ts";
import { electFleet, type FleetMember } from "../router/index.ts";
import type { InstanceView } from "./cluster-view.ts";

/** The text of `dynamo status`: a line per model, per instance, and per pair of workers that moved KV blocks. Pure. */
export function statusText(instances: readonly InstanceView[], where: string, nowMs: number): string {
  if (instances.length === 0) return `No instances in ${where}.\n`;
  const models = new Map<string, number>();
  for (const { card } of instances) if (card !== undefined) models.set(card.name, (models.get(card.name) ?? 0) + 1);
  const modelRows = [...models].map(([name, count]) => [name, String(count)]);
  const rows = instances.map((view) => instanceRow(view, nowMs));
  return [
    `${where}`,
    "",
    table([["MODEL", "WORKERS"], ...modelRows]),
    table([
      [
        "INSTANCE",
        "COMPONENT",
        "ROLE",
        "MODEL",
        "ENGINE",
        "RUNNING",
        "WAITING",
        "KV BLOCKS",
        "CACHED",
        "TOKENS",
        "PID",
        "UP",
      ],
      ...rows,
    ]),
    ...fleetTable(instances),
    ...tierTable(instances),
    ...transferTable(instances),
  ].join("\n");
}

/** A line per worker that does not serve its model, because it does not agree with most of the others; mostly none. */
function fleetTable(instances: readonly InstanceView[]): string[] {
  const rows = leftOut(instances).map(({ instanceId, model, why }) => [instanceId, model, why]);
  return rows.length === 0 ? [] : [table([["LEFT OUT", "MODEL", "WHY"], ...rows])];
}

/** As every frontend finds it by itself (router/fleet.ts). */
export function leftOut(
  instances: readonly InstanceView[],
): { readonly instanceId: string; readonly model: string; readonly why: string }[] {
  const models = new Map<string, FleetMember[]>();
  for (const { instanceId, card, endpoints } of instances) {
    if (card === undefined || !endpoints.includes(GENERATE_ENDPOINT)) continue;
    models.set(card.name, [...(models.get(card.name) ?? []), { instanceId, card }]);
  }
  return [...models].flatMap(([model, members]) =>
    [...electFleet(members).problems].map(([instanceId, why]) => ({ instanceId, model, why })),
  );
}

/** A line per tier below a worker's cache; nothing when no worker has any. */
function tierTable(instances: readonly InstanceView[]): string[] {
  const rows = instances.flatMap(({ instanceId, kvTiers = [] }) => kvTiers.map((use) => tierRow(instanceId, use)));
  return rows.length === 0
    ? []
    : [table([["INSTANCE", "KV TIER", "USED", "BUDGET", "HITS", "RESTORED", "STATE"], ...rows])];
}

function tierRow(instanceId: string, use: KvTierUse): string[] {
  const { tier, usedBytes, capacityBytes, hitBlocks, lookedUpBlocks, restoredBlocks, isDegraded } = use;
  return [
    instanceId,
    tier,
    size(usedBytes),
    capacityBytes === undefined ? "-" : size(capacityBytes),
    lookedUpBlocks === 0 ? "-" : `${((100 * hitBlocks) / lookedUpBlocks).toFixed(1)} % of ${lookedUpBlocks} blocks`,
    `${restoredBlocks} blocks`,
    isDegraded ? "degraded" : "ok",
  ];
}

/** `0 B`, `512.0 MB`, `4.2 GB`. */
function size(bytes: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const step = Math.min(units.length - 1, bytes < 1 ? 0 : Math.floor(Math.log10(bytes) / 3));
  return `${(bytes / 1_000 ** step).toFixed(step === 0 ? 0 : 1)} ${units[step]}`;
}

function transferTable(instances: readonly InstanceView[]): string[] {
  const rows = instances.flatMap(({ instanceId, transfers = [] }) =>
    transfers.map((pair) => pairRow(instanceId, pair)),
  );
  const titles = ["KV TRANSFERS", "WITH", "OVER", "COUNT", "MB", "GB/S", "LAST", "ERRORS", "WHY"];
  return rows.length === 0 ? [] : [table([titles, ...rows])];
}

function pairRow(instanceId: string, pair: TransferPairReport): string[] {
  const { lastGigabytesPerSecond: last, meanGigabytesPerSecond: mean } = pair;
  const warning = pair.isSlowPath ? "SLOW PATH: " : pair.isSlow ? "SLOW: " : "";
  return [
    `${instanceId} ${pair.operation === "read" ? "reads" : "writes"}`,
    pair.peer.slice(pair.peer.lastIndexOf(".") + 1),
    pair.backend,
    String(pair.transferCount),
    (pair.byteCount / 1e6).toFixed(1),
    mean.toFixed(2),
    last === 0 ? "-" : last.toFixed(2),
    String(pair.errorCount),
    `${warning}${pair.reason}`,
  ];
}

function instanceRow({ instanceId, component, card, load, pid, startedMs }: InstanceView, nowMs: number): string[] {
  const shown = (value: number | undefined): string => (value === undefined ? "-" : String(value));
  return [
    instanceId,
    component,
    card?.role ?? "-",
    card?.name ?? "-",
    card === undefined ? "-" : `${card.engine} ${card.engineVersion}`,
    shown(load?.runningRequests),
    shown(load?.waitingRequests),
    load === undefined ? "-" : `${load.activeBlocks}/${load.totalBlocks}`,
    shown(load?.cachedBlocks),
    shown(load?.generatedTokens),
    String(pid),
    duration(nowMs - startedMs),
  ];
}

/** Columns as wide as their widest cell, two spaces between. */
export function table(rows: readonly (readonly string[])[]): string {
  const widths = rows[0]!.map((_, column) => Math.max(...rows.map((row) => row[column]!.length)));
  return rows
    .map(
      (row) =>
        `${row
          .map((cell, column) => cell.padEnd(widths[column]!))
          .join("  ")
          .trimEnd()}\n`,
    )
    .join("");
}

/** `8s`, `3m 8s`, `2h 3m`, `4d 2h`. */
export function duration(ms: number): string {
  const seconds = Math.max(0, Math.floor(ms / 1_000));
  if (seconds < 60) return `${seconds}s`;
  const minutes = Math.floor(seconds / 60);
  if (minutes < 60) return `${minutes}m ${seconds % 60}s`;
  const hours = Math.floor(minutes / 60);
  return hours < 24 ? `${hours}h ${minutes % 60}m` : `${Math.floor(hours / 24)}d ${hours % 24}h`;
}
