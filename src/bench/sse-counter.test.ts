import assert from "node:assert/strict";
import test from "node:test";
import fc from "fast-check";
import { LatencyHistogram } from "./latency-histogram.ts";
import { SseCounter } from "./sse-counter.ts";

/** The counter by parsing every event. */
function naiveCount(text: string): { tokens: number; errors: number; isDone: boolean } {
  let tokens = 0;
  let errors = 0;
  let isDone = false;
  for (const line of text.split(/\r?\n/).slice(0, -1)) {
    if (!line.startsWith("data:")) continue;
    const data = line.slice(5).trimStart();
    if (data.startsWith("[DONE]")) {
      isDone = true;
      continue;
    }
    const event = JSON.parse(data) as Record<string, unknown>;
    if ("error" in event) errors++;
    else if (/* any text anywhere */ JSON.stringify(event, keepText).includes("HAS_TEXT")) tokens++;
  }
  return { tokens, errors, isDone };
}

function keepText(key: string, value: unknown): unknown {
  const isText = key === "content" || key === "text" || key === "reasoning_content";
  return isText && typeof value === "string" && value !== "" ? "HAS_TEXT" : value === "HAS_TEXT" ? "" : value;
}

const anyText = fc.oneof(fc.string(), fc.constantFrom("", '"content":"x"', "\\", '\\"text\\":', "é", "\n\n", "[DONE]"));
const event = fc.oneof(
  anyText.map((content) => ({ choices: [{ index: 0, delta: { content } }] })),
  anyText.map((text) => ({ id: "cmpl", choices: [{ text, index: 0 }] })),
  anyText.map((text) => ({ choices: [{ delta: { role: "assistant", content: null, reasoning_content: text } }] })),
  fc.constant({ choices: [], usage: { completion_tokens: 3 } }),
  fc.constant({ error: { message: "no", content: "x" } }),
);
const line = fc.oneof(
  {
    weight: 8,
    arbitrary: fc.tuple(event, fc.constantFrom("data: ", "data:")).map(([data, head]) => head + JSON.stringify(data)),
  },
  { weight: 1, arbitrary: fc.constantFrom(": comment", "event: x", "", "data: [DONE]") },
);

test("sse counter: counts what parsing every event counts, however the bytes are cut", () => {
  const lineEnd = fc.constantFrom("\n", "\r\n");
  const pieces = fc.array(fc.integer({ min: 1, max: 70 }), { maxLength: 60 });
  fc.assert(
    fc.property(fc.array(line, { maxLength: 20 }), lineEnd, pieces, (lines, end, lengths) => {
      const text = lines.map((one) => one + end + end).join("");
      const bytes = Buffer.from(text);
      const counter = new SseCounter();
      // One buffer for all pieces, overwritten each time, as a socket's would be.
      const reused = Buffer.alloc(bytes.length + 10, "X");
      for (let at = 0; at < bytes.length;) {
        const length = Math.min(bytes.length - at, lengths.pop() ?? bytes.length);
        reused.fill("X");
        bytes.copy(reused, 5, at, at + length);
        counter.write(reused, 5, 5 + length);
        at += length;
      }
      const { tokenCount, errorCount, isDone } = counter;
      assert.deepEqual({ tokens: tokenCount, errors: errorCount, isDone }, naiveCount(text));
    }),
    { numRuns: 500 },
  );
});

test("sse counter: a line without an end is bounded", () => {
  const counter = new SseCounter();
  const piece = Buffer.alloc(1024 * 1024, "x");
  for (let i = 0; i < 20; i++) counter.write(piece, 0, piece.length);
  assert.equal(counter.isOverlong, true);
});

test("latency histogram: percentiles are those of the sorted list, within 1 %", () => {
  fc.assert(
    fc.property(
      fc.array(fc.double({ min: 0.001, max: 1e6, noNaN: true }), { minLength: 1 }),
      fc.integer({ min: 1, max: 100 }),
      (values, percent) => {
        const histogram = new LatencyHistogram();
        for (const value of values) histogram.add(value);
        const exact = values.toSorted((a, b) => a - b)[Math.ceil((percent / 100) * values.length) - 1]!;
        const found = histogram.percentile(percent / 100);
        assert.ok(found >= exact * 0.9999 && found <= exact * 1.0101, `${found} for ${exact}`);
        assert.equal(histogram.percentiles().max, Math.max(...values));
      },
    ),
  );
});

test("latency histogram: tokens of one packet are 0 ms apart, and nothing recorded is 0", () => {
  const histogram = new LatencyHistogram();
  assert.equal(histogram.percentiles().p99, 0);
  for (let i = 0; i < 99; i++) histogram.add(0);
  histogram.add(50);
  const { p50, p99, max, mean, count } = histogram.percentiles();
  assert.deepEqual([p50, p99, max, mean, count], [0, 0, 50, 0.5, 100]);
});
