import type { KvEvent, KvRemoved, KvStored } from "../../protocol/index.ts";

/**
 * Makes few events of the many that one engine step tells: neighbours of one kind, rank and tier become one event, stored
 * ones only if they chain (the next one's parent is the last one's last block). No event is left with more than
 * `maxBlocks` blocks: larger ones are cut, so that a ring of events is bounded in bytes too. Order is kept; a cleared event
 * stands alone. Pure; events that need no change are passed on as they are.
 */
export function coalesceKvEvents(events: readonly KvEvent[], maxBlocks: number): KvEvent[] {
  const out: KvEvent[] = [];
  for (let i = 0; i < events.length;) {
    const first = events[i]!;
    let next = i + 1;
    if (first.type !== "cleared") {
      while (next < events.length && continues(events[next - 1]!, events[next]!)) next++;
    }
    if (first.type === "cleared") out.push(first);
    else if (first.type === "stored") cutStored(events.slice(i, next) as KvStored[], maxBlocks, out);
    else cutRemoved(events.slice(i, next) as KvRemoved[], maxBlocks, out);
    i = next;
  }
  return out;
}

function continues(last: KvEvent, next: KvEvent): boolean {
  if (last.type === "cleared" || next.type === "cleared") return false;
  if (last.type !== next.type || last.dpRank !== next.dpRank || last.tier !== next.tier) return false;
  if (last.type === "removed" || next.type === "removed") return true;
  const end = last.sequenceHashes.length;
  return (
    end > 0 &&
    next.parentHash !== undefined &&
    next.parentHash[0] === last.sequenceHashes[end - 2] &&
    next.parentHash[1] === last.sequenceHashes[end - 1]
  );
}

/** `group`: stored events that chain. */
function cutStored(group: readonly KvStored[], maxBlocks: number, out: KvEvent[]): void {
  const first = group[0]!;
  const sequenceHashes = joined(group.map((event) => event.sequenceHashes));
  const localHashes = joined(group.map((event) => event.localHashes));
  const blockCount = sequenceHashes.length / 2;
  if (group.length === 1 && blockCount <= maxBlocks) {
    if (blockCount > 0) out.push(first);
    return;
  }
  for (let from = 0; from < blockCount; from += maxBlocks) {
    const to = Math.min(blockCount, from + maxBlocks);
    out.push({
      ...first,
      parentHash: from === 0 ? first.parentHash : [sequenceHashes[2 * from - 2]!, sequenceHashes[2 * from - 1]!],
      startBlock: first.startBlock + from,
      sequenceHashes: sequenceHashes.slice(2 * from, 2 * to),
      localHashes: localHashes.slice(2 * from, 2 * to),
    });
  }
}

function cutRemoved(group: readonly KvRemoved[], maxBlocks: number, out: KvEvent[]): void {
  const sequenceHashes = joined(group.map((event) => event.sequenceHashes));
  if (group.length === 1 && sequenceHashes.length <= 2 * maxBlocks) {
    if (sequenceHashes.length > 0) out.push(group[0]!);
    return;
  }
  for (let from = 0; from < sequenceHashes.length; from += 2 * maxBlocks) {
    out.push({ ...group[0]!, sequenceHashes: sequenceHashes.slice(from, from + 2 * maxBlocks) });
  }
}

function joined(parts: readonly Uint32Array[]): Uint32Array {
  if (parts.length === 1) return parts[0]!;
  const whole = new Uint32Array(parts.reduce((length, part) => length + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}
