import assert from "node:assert/strict";
import { test } from "node:test";
import { syntheticTrace, traceRequests, type TraceSession } from "./index.ts";

function promptsOf(session: TraceSession, number: number): string[] {
  return [...traceRequests(session, number)].map(({ promptTokenIds }) => String.fromCharCode(...promptTokenIds));
}

/** A Mooncake-like row. */
function aRow(hashIds: readonly number[], tokens: number): TraceSession {
  return {
    arrivalMs: 0,
    start: { kind: "blocks", hashIds: Uint32Array.from(hashIds), blockSizeTokens: 512 },
    turns: [{ newTokens: tokens, outputTokens: 5, delayMs: 0 }],
  };
}

test("trace requests: prompts begin alike exactly as far as their hash ids do, in any session, at any time", () => {
  const [first] = promptsOf(aRow([7, 8, 9], 1_500), 0);
  const [second] = promptsOf(aRow([7, 8, 10], 1_500), 1);
  assert.equal(first!.length, 1_500);
  assert.equal(first!.slice(0, 1_024), second!.slice(0, 1_024));
  assert.notEqual(first!.slice(1_024, 1_040), second!.slice(1_024, 1_040));
  assert.deepEqual(promptsOf(aRow([7, 8, 9], 1_500), 5), [first]);
});

test("trace requests: every token id is printable ASCII, and all of it is used", () => {
  const [request] = traceRequests(aRow([1, 2, 3, 4], 2_048), 0);
  const ids = new Set(request!.promptTokenIds);
  assert.equal(Math.min(...ids), 32);
  assert.equal(Math.max(...ids), 126);
  assert.equal(ids.size, 95);
});

test("trace requests: a later turn begins with the prompt before it, and is longer by the answer and what is new", () => {
  const { sessions } = syntheticTrace({ sessions: 2, inputTokens: 100, outputTokens: 20, intervalMs: 0, turns: 3, turnTokens: 10 }); // prettier-ignore
  const [one, two, three] = promptsOf(sessions[0]!, 0);
  assert.deepEqual([one!.length, two!.length, three!.length], [100, 130, 160]);
  assert.ok(two!.startsWith(one!) && three!.startsWith(two!));
  assert.notEqual(promptsOf(sessions[1]!, 1)[0]!.slice(0, 20), one!.slice(0, 20));
});
