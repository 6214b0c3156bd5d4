import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { StopMatcher } from "./stop-matcher.ts";

interface Result {
  readonly text: string;
  readonly stop: string | undefined;
}

/** The definition: at the first place where a stop string ends, the longest that ends there cuts the text. */
function naive(stops: readonly string[], text: string): Result {
  for (let end = 1; end <= text.length; end++) {
    const ending = stops.filter((stop) => stop !== "" && text.slice(0, end).endsWith(stop));
    ending.sort((a, b) => b.length - a.length);
    const [stop] = ending;
    if (stop !== undefined) return { text: text.slice(0, end - stop.length), stop };
  }
  return { text, stop: undefined };
}

function run(stops: readonly string[], chunks: readonly string[]): Result {
  const matcher = new StopMatcher(stops);
  let text = "";
  for (const chunk of chunks) text += matcher.push(chunk);
  return { text: text + matcher.flush(), stop: matcher.matchedStop };
}

const letters = fc.string({ unit: fc.constantFrom("a", "b", "c"), maxLength: 14 });
const stopStrings = fc.array(fc.string({ unit: fc.constantFrom("a", "b", "c"), maxLength: 5 }), { maxLength: 4 });

test("any text and stop strings, split everywhere, end where the definition says", () => {
  fc.assert(
    fc.property(stopStrings, letters, (stops, text) => {
      const expected = naive(stops, text);
      assert.deepEqual(run(stops, [text]), expected);
      assert.deepEqual(run(stops, Array.from(text)), expected);
      for (let at = 0; at <= text.length; at++)
        assert.deepEqual(run(stops, [text.slice(0, at), text.slice(at)]), expected);
    }),
    { numRuns: 2_000 },
  );
});

test("what is held back is exactly what could still become a stop string", () => {
  fc.assert(
    fc.property(stopStrings, fc.array(letters, { maxLength: 5 }), (stops, chunks) => {
      const matcher = new StopMatcher(stops);
      let seen = "";
      let shown = "";
      for (const chunk of chunks) {
        seen += chunk;
        shown += matcher.push(chunk);
        if (matcher.matched) return;
        let held = 0;
        for (const stop of stops) {
          for (let length = 1; length < stop.length; length++)
            if (seen.endsWith(stop.slice(0, length))) held = Math.max(held, length);
        }
        assert.equal(shown, seen.slice(0, seen.length - held));
      }
    }),
    { numRuns: 1_000 },
  );
});

test("a stop string over several chunks ends the text before it, and nothing comes after", () => {
  const matcher = new StopMatcher(["\n\nUser:", "###"]);
  assert.equal(matcher.push("Hello\n"), "Hello");
  assert.equal(matcher.push("\nUs"), "");
  assert.equal(matcher.matched, false);
  assert.equal(matcher.push("er: more"), "");
  assert.equal(matcher.matched, true);
  assert.equal(matcher.matchedStop, "\n\nUser:");
  assert.equal(matcher.push("later"), "");
  assert.equal(matcher.flush(), "");
});

test("text that only looked like a stop string comes out when it goes on differently, or at the end", () => {
  const matcher = new StopMatcher(["stop"]);
  assert.equal(matcher.push("a sto"), "a ");
  assert.equal(matcher.push("ne st"), "stone ");
  assert.equal(matcher.flush(), "st");
  assert.equal(matcher.matched, false);
});

test("without stop strings, or with empty ones, text passes through as it is", () => {
  for (const stops of [[], ["", ""]]) {
    const matcher = new StopMatcher(stops);
    const text = "any text";
    assert.equal(matcher.push(text), text);
    assert.equal(matcher.flush(), "");
    assert.equal(matcher.matched, false);
  }
});

test("characters outside the first plane stay whole around a stop string", () => {
  assert.deepEqual(run(["😀b"], ["a😀", "c😀", "b"]), { text: "a😀c", stop: "😀b" });
  assert.deepEqual(run(["\ude00"], ["😀"]), { text: "😀", stop: undefined });
});

test("a long repetitive stop string costs no more than its text", () => {
  const matcher = new StopMatcher(["a".repeat(1_000) + "b"]);
  const started = performance.now();
  let shown = 0;
  for (let index = 0; index < 100_000; index++) shown += matcher.push("a").length;
  assert.equal(shown, 99_000);
  assert.ok(performance.now() - started < 2_000);
});
