import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { TokenSource, type TokenSourceOptions } from "./token-source.ts";

const PLAIN: TokenSourceOptions = { vocabularySize: 256, maxTokens: 100 };
const THINKING: TokenSourceOptions = {
  ...PLAIN,
  reasoning: { startTokenId: 250, endTokenId: 251, thinkingRatio: 0.5 },
};

function answer(prompt: readonly number[], count: number, options: TokenSourceOptions): number[] {
  const source = new TokenSource(Uint32Array.from(prompt), options);
  return Array.from({ length: count }, () => {
    const token = source.peek();
    source.absorb(token);
    return token;
  });
}

const prompts = fc.array(fc.nat(249), { minLength: 1, maxLength: 20 });

test("token source: an answer cut anywhere and sent on with what is there goes on as if it had not been cut", () => {
  const seeds = fc.option(fc.nat(), { nil: undefined });
  fc.assert(
    fc.property(prompts, fc.nat(20), seeds, fc.constantFrom(PLAIN, THINKING), (prompt, cut, seed, options) => {
      const whole = answer(prompt, 20, { ...options, seed, maxTokens: 20 });
      const rest = answer([...prompt, ...whole.slice(0, cut)], 20 - cut, { ...options, seed, maxTokens: 20 - cut });
      assert.deepEqual([...whole.slice(0, cut), ...rest], whole);
    }),
  );
});

test("token source: other prompts and other seeds get other answers", () => {
  const answers = [
    answer([1, 2, 3], 30, PLAIN),
    answer([1, 2, 4], 30, PLAIN),
    answer([2, 1, 3], 30, PLAIN),
    answer([1, 2, 3], 30, { ...PLAIN, seed: 1 }),
    answer([1, 2, 3], 30, { ...PLAIN, seed: 2 }),
  ].map(String);
  assert.equal(new Set(answers).size, answers.length);
});

test("token source: byte vocabularies get letters and spaces, others ids above the special tokens", () => {
  assert.match(String.fromCharCode(...answer([7], 200, PLAIN)), /^[a-z ]{200}$/);
  const large = answer([7], 200, { ...PLAIN, vocabularySize: 49_152 });
  assert.ok(large.every((token) => token >= 1_000 && token < 2_000));
  assert.ok(new Set(large).size > 100);
  assert.ok(answer([7], 200, { ...PLAIN, vocabularySize: 1_024 }).every((token) => token < 1_024));
});

test("token source: reasoning takes its share of the answer, between its marks", () => {
  const tokens = answer([1, 2, 3], 40, { ...THINKING, maxTokens: 40 });
  assert.equal(tokens[0], 250);
  assert.equal(tokens.indexOf(251), 19);
  assert.equal(tokens.lastIndexOf(251), 19);
});

test("token source: an earlier turn's reasoning in the prompt does not stop a new one", () => {
  const first = answer([1, 2, 3], 10, { ...THINKING, maxTokens: 10 });
  const second = answer([1, 2, 3, ...first, 60, 61, 62], 10, { ...THINKING, maxTokens: 10 });
  assert.equal(second[0], 250);
});
