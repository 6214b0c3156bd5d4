import type { Cluster } from "./cluster.ts";

type TierEvents = readonly { readonly type: string; readonly tier?: string; readonly sequenceHashes?: Uint32Array }[];

/** Nobody uses a block of a tier, and none is half filled. */
export function checkTiersAtRest({ workers }: Cluster, violations: string[]): void {
  for (const { tiers, process } of workers) {
    if (tiers === undefined) continue;
    for (const [name, index] of [
      ["host", tiers.host],
      ["disk", tiers.disk?.index],
    ] as const) {
      const pool = index?.pool;
      if (pool === undefined) continue;
      if (pool.activeCount > 0)
        violations.push(`${process.name}: ${pool.activeCount} blocks of the ${name} tier in use at rest`);
      if (pool.mutableCount > 0)
        violations.push(`${process.name}: ${pool.mutableCount} blocks of the ${name} tier half filled at rest`);
    }
  }
}

/** The index may lack blocks behind a hole, but has none of a tier that are not there. */
export function checkTierView(
  { workers }: Cluster,
  where: string,
  instanceId: string,
  events: TierEvents,
  violations: string[],
): void {
  const tiers = workers.find(({ worker }) => worker?.instanceId === instanceId)?.tiers;
  for (const tier of ["host", "disk"] as const) {
    const known = hashes(events.filter((event) => event.tier === tier));
    const truth = hashes([
      { type: "", sequenceHashes: (tier === "host" ? tiers?.host : tiers?.disk?.index)?.hashes() ?? new Uint32Array() },
    ]);
    const extra = [...known].filter((hash) => !truth.has(hash)).length;
    if (extra > 0)
      violations.push(
        `${where}: the index has ${extra} blocks of the ${tier} tier that are not there, of ${truth.size}`,
      );
  }
}

function hashes(events: TierEvents): Set<string> {
  const set = new Set<string>();
  for (const { sequenceHashes } of events) {
    for (let i = 0; i < (sequenceHashes?.length ?? 0); i += 2)
      set.add(`${sequenceHashes![i]}:${sequenceHashes![i + 1]}`);
  }
  return set;
}
