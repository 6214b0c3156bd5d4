/**
 * Coverage marks: every fault path of the simulation names itself when it was really reached, not when it was planned.
 * The test of the standard seeds fails when one of these was never reached.
 */
export const MARKS = [
  "worker killed mid-stream",
  "worker killed idle",
  "worker restarted",
  "recovery time looked at",
  "balance looked at",
  "worker frozen mid-stream",
  "worker thawed",
  "worker drained mid-stream",
  "worker host lost power",
  "frontend killed mid-stream",
  "frontend frozen",
  "frontend drained mid-stream",
  "frontend restarted",
  "engine died",
  "engine hung",
  "link partitioned",
  "link partitioned one way",
  "link slow",
  "connection reset",
  "packet split",
  "connection refused",
  "discovery unreachable",
  "discovery down",
  "lease lost",
  "event lost",
  "event repeated",
  "events overtaken by another publisher's",
  "replay lost",
  "clock jumped back",
  "clock jumped forward",
  "client left mid-stream",
  "client left early",
  "client read slowly",
  "client cut off as a slow reader",
  "client sent a hostile body",
  "client sent garbage",
  "request finished",
  "request stopped by a stop string",
  "request failed before its headers",
  "stream failed after its headers",
  "connection lost with its frontend",
  "request refused for overload",
  "request refused while draining",
  "request ran out of time",
  "prefix reused",
  "sequence preempted",
  "index restored: incremental",
  "index restored: full",
  "request migrated",
  "frontend unreachable",
  "blocks handed over",
  "prompt computed by the decode worker instead",
  "memory of handoffs full",
  "prefill worker killed before its transfer",
  "prefill worker killed during its transfer",
  "prefill worker killed after its transfer",
  "prefill worker lost power during its transfer",
  "decode worker killed while pulling",
  "transfer broken",
  "transfer stalled",
  "transfer ran out of time",
  "role changed",
  "blocks restored from host memory",
  "blocks restored from disk",
  "blocks restored from the store",
  "request parked until its deadline",
  "write torn",
  "disk full",
  "disk hung",
  "disk slow",
  "disk tier degraded",
  "file of the disk tier lost",
  "bit flipped on disk",
  "damaged entry refused",
  "blocks found again after a restart",
  "store hung",
  "store tier degraded",
  "objects damaged",
  "damaged object refused",
] as const;

export type Mark = (typeof MARKS)[number];

export class Marks {
  readonly counts = new Map<Mark, number>();

  mark(mark: Mark): void {
    this.counts.set(mark, (this.counts.get(mark) ?? 0) + 1);
  }

  add(other: Marks): void {
    for (const [mark, count] of other.counts) this.counts.set(mark, (this.counts.get(mark) ?? 0) + count);
  }

  missing(): Mark[] {
    return MARKS.filter((mark) => !this.counts.has(mark));
  }
}
