import assert from "node:assert/strict";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import fc from "fast-check";
import { DynamoError } from "../errors/index.ts";
import { parseTrace, readTrace, summarizeTrace, syntheticTrace, type SyntheticOptions } from "./index.ts";
import { firstPrompt, nextPrompt } from "./prompt-source.ts";

const FIXTURES = join(import.meta.dirname, "fixtures");
const ROW = { timestamp: 5, input_length: 1_000, output_length: 10, hash_ids: [7, 8] };
const row = (overrides: Record<string, unknown> = {}): string => JSON.stringify({ ...ROW, ...overrides });

const isInvalid =
  (pattern: RegExp) =>
  (error: unknown): boolean =>
    error instanceof DynamoError && error.reason === "invalid-config" && pattern.test(error.message);

test("trace: the sample of the conversation trace is read as it is", async () => {
  const trace = await readTrace(join(FIXTURES, "mooncake-conversation-200.jsonl"));
  assert.deepEqual(trace.sessions[0], {
    arrivalMs: 0,
    start: { kind: "blocks", hashIds: Uint32Array.from({ length: 14 }, (_, i) => i), blockSizeTokens: 512 },
    turns: [{ newTokens: 6_758, outputTokens: 500, delayMs: 0 }],
  });
  const summary = summarizeTrace(trace);
  assert.deepEqual([summary.sessions, summary.requests], [200, 200]);
  assert.ok(summary.endlessCacheHitRate! > 0.05 && summary.endlessCacheHitRate! < 0.5);
  assert.equal((await readTrace(join(FIXTURES, "mooncake-conversation-200.jsonl"), { maxRows: 3 })).sessions.length, 3);
});

test("trace: Azure rows with CRLF and no last newline are read, times from the first one", async () => {
  const { sessions, name } = await readTrace(join(FIXTURES, "azure-conv-20.csv"));
  assert.deepEqual([name, sessions.length], ["azure-conv-20.csv", 20]);
  assert.deepEqual(sessions[0]!.turns, [{ newTokens: 374, outputTokens: 44, delayMs: 0 }]);
  assert.equal(sessions[0]!.arrivalMs, 0);
  assert.ok(Math.abs(sessions[1]!.arrivalMs - 4_314.579) < 0.001);
});

test("trace: what breaks the format is named with its line", () => {
  const azure = "TIMESTAMP,ContextTokens,GeneratedTokens";
  const cases: [string, RegExp][] = [
    ["", /line 1: the file is empty/],
    [`${row()}\n\n{"timestamp"`, /line 3: not a JSON object/],
    [row({ timestamp: -1 }), /line 1: timestamp: expected a number from 0 .* got -1/],
    [row({ input_length: 0 }), /input_length/],
    [row({ input_length: "9" }), /input_length: .* got "9"/],
    [row({ output_length: null }), /output_length: .* got null/],
    [row({ hash_ids: [1] }), /hash_ids: expected 2 ids, one per 512 tokens, got 1/],
    [row({ hash_ids: undefined }), /hash_ids: expected 2 ids, .* got nothing/],
    [row({ hash_ids: [1, 2.5] }), /hash_ids: expected whole numbers/],
    [row({ hash_ids: [1, 4_294_967_296] }), /hash_ids: expected whole numbers/],
    ["TIMESTAMP,Tokens\n1,2", /line 1: expected a Mooncake row or the header/],
    [`${azure}\r\n2023-11-16 18:15:46.68,3`, /line 2: expected 3 cells, got 2/],
    [`${azure}\n16.11.2023,3,4`, /line 2: TIMESTAMP: expected YYYY/],
    [`${azure}\n2023-11-16 18:15:46,3,4\n2023-11-16 18:15:45,3,4`, /line 3: TIMESTAMP: before/],
    [`${azure}\n2023-11-16 18:15:46,0,4`, /line 2: ContextTokens: .* got "0"/],
    [`${azure}\n2023-11-16 18:15:46,1,x`, /line 2: GeneratedTokens: .* got "x"/],
  ];
  for (const [text, pattern] of cases) assert.throws(() => parseTrace(text), isInvalid(pattern), String(pattern));
});

test("trace: no text makes the readers throw anything but invalid-config", () => {
  const piece = fc.constantFrom(
    "{",
    "}",
    '"timestamp":',
    "1",
    ",",
    "\n",
    "hash_ids",
    "[",
    "]",
    "TIMESTAMP",
    "é",
    row(),
  );
  fc.assert(
    fc.property(
      fc.oneof(
        fc.string(),
        fc.array(piece).map((list) => list.join("")),
      ),
      (text) => {
        // prettier-ignore
        try {
        parseTrace(text);
      } catch (error) {
        assert.ok(isInvalid(/^trace trace, line \d+: /)(error), String(error));
      }
      },
    ),
  );
});

test("trace: a file that cannot be read is said so", async () => {
  const folder = await mkdtemp(join(tmpdir(), "replay-trace-"));
  try {
    await assert.rejects(readTrace(join(folder, "none.jsonl")), isInvalid(/cannot be read/));
    await writeFile(join(folder, "bad.jsonl"), `${row()}\nx`);
    await assert.rejects(readTrace(join(folder, "bad.jsonl")), isInvalid(/trace bad.jsonl, line 2/));
  } finally {
    await rm(folder, { recursive: true });
  }
});

test("prompts: begin alike exactly as far as their ids do", () => {
  const ids = fc.array(fc.nat(2), { minLength: 1, maxLength: 5 });
  fc.assert(
    fc.property(ids, ids, fc.integer({ min: 1, max: 4 }), (a, b, blockSizeTokens) => {
      const prompt = (list: number[], session: number): Uint32Array => {
        // An id names its content with all before it, as in the traces.
        const hashIds = Uint32Array.from(list, (_, i) => Number(`1${list.slice(0, i + 1).join("")}`));
        return firstPrompt({ kind: "blocks", hashIds, blockSizeTokens }, session, list.length * blockSizeTokens + 3);
      };
      const [left, right] = [prompt(a, 1), prompt(b, 2)];
      let common = 0;
      while (common < Math.min(a.length, b.length) && a[common] === b[common]) common++;
      let alike = 0;
      while (alike < left.length && left[alike] === right[alike]) alike++;
      assert.equal(alike, common * blockSizeTokens);
    }),
  );
});

test("prompts: a group's prefix is the same in all its sessions, and later turns go on from what was said", () => {
  const [a, b, c] = [1, 2, 3].map((session) => firstPrompt({ kind: "group", group: session === 3 ? 1 : 0, tokens: 60 }, session, 100)); // prettier-ignore
  assert.deepEqual(a!.subarray(0, 60), b!.subarray(0, 60));
  assert.notDeepEqual(a!.subarray(60), b!.subarray(60));
  assert.notDeepEqual(a!.subarray(0, 60), c!.subarray(0, 60));
  const next = nextPrompt(a!, [7, 8, 9], 20, 1, 1);
  assert.deepEqual([...next.subarray(0, 103)], [...a!, 7, 8, 9]);
  assert.equal(next.length, 123);
  assert.notDeepEqual(next.subarray(103), nextPrompt(a!, [7, 8, 9], 20, 1, 2).subarray(103));
});

test("synthetic trace: the same seed gives the same trace, with the lengths and groups asked for", () => {
  const options: SyntheticOptions = { sessions: 2_000, inputTokens: 100, outputTokens: 20, intervalMs: 10, lengthSpread: 0.5, turns: 2, turnTokens: 30, turnDelayMs: 5, sharedPrefixRatio: 0.25, groups: 4, groupSkew: 1 }; // prettier-ignore
  const trace = syntheticTrace(options);
  assert.deepEqual(trace, syntheticTrace(options));
  assert.notDeepEqual(trace, syntheticTrace({ ...options, seed: 2 }));
  const counts = [0, 0, 0, 0];
  for (const { start, turns } of trace.sessions) {
    assert.ok(start.kind === "group" && start.tokens === 25);
    counts[start.group]!++;
    assert.ok(turns[0]!.newTokens >= 50 && turns[0]!.newTokens <= 150 && turns[1]!.newTokens >= 15);
  }
  // Weights 1, 1/2, 1/3, 1/4.
  [0.48, 0.24, 0.16, 0.12].forEach((share, i) => assert.ok(Math.abs(counts[i]! / 2_000 - share) < 0.04));
  const { spanMs } = summarizeTrace(trace);
  assert.ok(spanMs > 18_000 && spanMs < 22_000);
  assert.throws(() => syntheticTrace({ ...options, groups: 0 }), isInvalid(/groups/));
  assert.throws(() => syntheticTrace({ ...options, sharedPrefixRatio: 2 }), isInvalid(/shared prefix ratio/));
});
