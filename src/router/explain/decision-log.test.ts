import assert from "node:assert/strict";
import { test } from "node:test";
import { DEFAULT_ROUTER_CONFIG } from "../config.ts";
import { aCandidate } from "../policies/policy.battery.ts";
import { CandidateColumns, computeCosts } from "../scheduling/cost.ts";
import { DecisionLog, DecisionRecord } from "./decision-log.ts";
import { renderDecision } from "./render.ts";

const PROMPT = { tokens: 160, blocks: 10, blockSizeTokens: 16 };

function aRecord(requestId: string, candidateCount: number): DecisionRecord {
  const record = new DecisionRecord({
    requestId,
    atMs: 0,
    policy: "kv",
    prompt: PROMPT,
    weights: DEFAULT_ROUTER_CONFIG,
    candidates: Array.from({ length: candidateCount }, (_, i) =>
      aCandidate({ instanceId: String(i).padStart(16, "0") }),
    ),
    leftOut: { tried: 0, notAllowed: 0, inhibited: 0, busy: 0 },
    degradations: [],
    queuedMs: 0,
    resumedTokens: 0,
    stage: "aggregated",
  });
  record.chosen = 0;
  return record;
}

/** Columns whose every number tells the record and the candidate. */
function columnsFor(mark: number, count: number): CandidateColumns {
  const columns = new CandidateColumns();
  columns.resize(count);
  for (let i = 0; i < count; i++) {
    columns.device[i] = (mark + i) % 10;
    columns.prefillTokens[i] = mark * 16;
    columns.decodeBlocks[i] = mark + i;
    columns.multiplier[i] = 1;
  }
  computeCosts(columns, PROMPT, DEFAULT_ROUTER_CONFIG);
  return columns;
}

function assertIntact(log: DecisionLog, record: DecisionRecord, mark: number): void {
  const count = record.candidates.length;
  const columns = log.columnsOf(record);
  assert.ok(columns !== undefined, `${record.requestId} lost its numbers`);
  const expected = columnsFor(mark, count);
  for (const name of ["device", "prefillTokens", "decodeBlocks", "cost"] as const) {
    assert.deepEqual(
      [...columns[name].subarray(0, count)],
      [...expected[name].subarray(0, count)],
      `${record.requestId} ${name}`,
    );
  }
}

test("decision log: keeps the last records with their numbers, whatever their sizes, and stays within its bytes", () => {
  const log = new DecisionLog({ records: 50, arenaBytes: 64 * 1024 });
  const records: DecisionRecord[] = [];
  for (let mark = 0; mark < 400; mark++) {
    const count = 1 + ((mark * 7) % 60);
    const record = aRecord(`r${mark}`, count);
    records.push(record);
    log.add(record, columnsFor(mark, count));
    // The newest has its numbers; what older ones still have is theirs.
    assertIntact(log, record, mark);
    if (mark % 20 === 19) {
      records.slice(-50).forEach((kept, i, last) => {
        if (log.columnsOf(kept) !== undefined) assertIntact(log, kept, mark - last.length + 1 + i);
      });
    }
    assert.ok(log.length <= 50 && log.arenaBytes <= 64 * 1024);
  }
  assert.deepEqual(log.find("r0"), []);
  assert.equal(log.find("r399").length, 1);
});

test("decision log: with room for all of them every kept record has its numbers, and the arena only grows as needed", () => {
  const log = new DecisionLog();
  const records: DecisionRecord[] = [];
  for (let mark = 0; mark < 6_000; mark++) {
    const record = aRecord(`r${mark}`, 4);
    records.push(record);
    log.add(record, columnsFor(mark, 4));
  }
  for (let mark = 6_000 - 4_096; mark < 6_000; mark += 15) assertIntact(log, records[mark]!, mark);
  assert.ok(log.arenaBytes <= 1024 * 1024, `${log.arenaBytes} bytes`);
});

test("decision log: finds a request with its retries and samples, and not others that begin alike", () => {
  const log = new DecisionLog();
  for (const id of ["abc", "abc", "abc-1", "abc-p2", "abc-p2-1", "abcd", "abc-x"])
    log.add(aRecord(id, 1), columnsFor(1, 1));
  assert.deepEqual(
    log.find("abc").map((record) => record.requestId),
    ["abc", "abc", "abc-1", "abc-p2", "abc-p2-1"],
  );
});

test("explain: prediction in whole blocks without the last token, and what the engine said, side by side", () => {
  const record = aRecord("r", 2);
  record.overlapBlocks = 10;
  const before = renderDecision(record, columnsFor(3, 2));
  assert.deepEqual(before.predicted, { cached_blocks: 9, cached_tokens: 144 });
  assert.equal(before.actual, null);
  record.cachedTokens = 159;
  record.firstTokenMs = 12.3456;
  const after = renderDecision(record, columnsFor(3, 2));
  assert.equal(after.actual?.cached_blocks, after.predicted.cached_blocks);
  assert.equal(after.actual?.duration_ms, null);
  assert.deepEqual(after.candidates[0]?.cost.total, 10 + 3 - 3 + 3);
});

test("explain: a record whose numbers are gone says so and keeps the rest", () => {
  const explained = renderDecision(aRecord("r", 2), undefined);
  assert.deepEqual(explained.candidates, []);
  assert.match(explained.degradations[0]!, /made room/);
});
