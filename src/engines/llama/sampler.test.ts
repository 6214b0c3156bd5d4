import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { GREEDY, type SamplingOptions } from "../../protocol/index.ts";
import { SeededRandom } from "../../std/index.ts";
import { NaiveSampler, naiveLogprob } from "./naive-sampler.ts";
import { Sampler, promptLogprob } from "./sampler.ts";

/** Rows as models make them, with many equal values, and with values that no model should make. */
const aLogit = fc.oneof(
  { weight: 8, arbitrary: fc.float({ min: -20, max: 20, noNaN: true, noDefaultInfinity: true }) },
  { weight: 2, arbitrary: fc.integer({ min: -2, max: 2 }) },
  { weight: 1, arbitrary: fc.constantFrom(-Infinity, NaN) },
);
const aRow = fc
  .oneof(
    fc.array(aLogit, { minLength: 1, maxLength: 700 }),
    // Few levels, all likely: cuts fall between equals.
    fc.array(fc.integer({ min: 0, max: 3 }), { minLength: 1, maxLength: 60 }),
  )
  .map((logits) => Float32Array.from(logits));

const someSampling: fc.Arbitrary<SamplingOptions> = fc.record({
  temperature: fc.constantFrom(0, 0.1, 0.7, 1, 2),
  topP: fc.oneof(fc.constant(1), fc.double({ min: 0.01, max: 0.999, noNaN: true })),
  topK: fc.oneof(fc.constant(0), fc.integer({ min: 1, max: 20 }), fc.integer({ min: 1, max: 800 })),
  minP: fc.oneof(fc.constant(0), fc.double({ min: 0.001, max: 0.9, noNaN: true })),
  presencePenalty: fc.constantFrom(0, 0, 0.5, -1),
  frequencyPenalty: fc.constantFrom(0, 0, 0.3, -0.5),
  repetitionPenalty: fc.constantFrom(1, 1, 1.3, 0.8),
  logitBias: fc.array(fc.tuple(fc.nat(750), fc.double({ min: -100, max: 100, noNaN: true })), { maxLength: 4 }),
});

/** Sums of floats in another order may put a draw that falls on a border on either side of it. */
const BORDER = 1e-5;

void test("sampler: the same tokens as the naive one, over whole generations", () => {
  fc.assert(
    fc.property(
      fc.array(aRow, { minLength: 1, maxLength: 4 }),
      someSampling,
      fc.nat(0xffffffff),
      fc.array(fc.nat(750), { maxLength: 20 }),
      fc.array(fc.nat(750), { maxLength: 3 }),
      (rows, sampling, seed, prompt, suppress) => {
        const resumedTokenIds = Uint32Array.from(prompt.slice(0, prompt.length >> 1));
        const promptTokenIds = Uint32Array.from(prompt);
        const options = { vocabularySize: rows[0]!.length, promptTokenIds, resumedTokenIds, seed };
        const sampler = new Sampler(sampling, options);
        const naive = new NaiveSampler(sampling, options);
        for (const row of rows) {
          const logits = row.length === options.vocabularySize ? row : rows[0]!;
          const before = logits.slice();
          const token = sampler.sample(logits, suppress);
          const choice = naive.sample(logits, suppress);
          assert.deepEqual(logits, before, "logits are only read");
          if (token !== choice.tokenId) assertOnBorder(token, choice);
          sampler.accept(token);
          naive.accept(token);
        }
      },
    ),
    { numRuns: 400 },
  );
});

function assertOnBorder(token: number, choice: ReturnType<NaiveSampler["sample"]>): void {
  let before = 0;
  const found = choice.candidates.find(({ id, probability }) => {
    if (id === token) return true;
    before += probability;
    return false;
  });
  assert.ok(found !== undefined && choice.uniform !== undefined, `token ${token} cannot come`);
  const inside = choice.uniform > before - BORDER && choice.uniform < before + found.probability + BORDER;
  assert.ok(inside, `token ${token} covers ${before} to ${before + found.probability}, drawn was ${choice.uniform}`);
}

/** Bell-shaped, like a model's: most tokens far below the best. */
function aModelRow(vocabularySize: number, random = new SeededRandom(1)): Float32Array {
  return Float32Array.from({ length: vocabularySize }, () => {
    let sum = 0;
    for (let i = 0; i < 6; i++) sum += random.nextFloat();
    return (sum - 3) * 4 + 5;
  });
}

for (const [title, sampling] of Object.entries({
  "temperature alone": { temperature: 1.5 },
  "top-p": { temperature: 1, topP: 0.8 },
  "top-p at a high temperature": { temperature: 2, topP: 0.97 },
  "top-k": { temperature: 1, topK: 40 },
  "top-k and top-p": { temperature: 0.7, topK: 300, topP: 0.5 },
  "min-p": { temperature: 1, minP: 0.02 },
})) {
  void test(`sampler: a whole vocabulary with ${title} gives the naive one's tokens`, () => {
    const logits = aModelRow(49_152);
    const options = { vocabularySize: logits.length, promptTokenIds: new Uint32Array(0), seed: 3 };
    const sampler = new Sampler({ ...GREEDY, ...sampling }, options);
    const naive = new NaiveSampler({ ...GREEDY, ...sampling }, options);
    for (let i = 0; i < 3; i++) {
      const token = sampler.sample(logits);
      const choice = naive.sample(logits);
      if (token !== choice.tokenId) assertOnBorder(token, choice);
    }
  });
}

void test("sampler: tokens come as often as the softmax says", () => {
  const logits = Float32Array.from([2, 1, 0, -1, 1.5, -3, NaN, -Infinity]);
  for (const filters of [{}, { topK: 4 }, { topP: 0.9 }, { minP: 0.1 }]) {
    const options = { vocabularySize: 8, promptTokenIds: new Uint32Array(0), seed: 11 };
    const sampler = new Sampler({ ...GREEDY, temperature: 1, ...filters }, options);
    const { candidates } = new NaiveSampler({ ...GREEDY, temperature: 1, ...filters }, options).sample(logits);
    const draws = 20_000;
    const counts = new Float64Array(8);
    for (let i = 0; i < draws; i++) counts[sampler.sample(logits)]!++;
    let chiSquare = 0;
    for (const { id, probability } of candidates) {
      chiSquare += (counts[id]! - draws * probability) ** 2 / (draws * probability);
      counts[id] = 0;
    }
    // 99.9 % of true samples with 5 degrees of freedom stay under 20.5.
    assert.ok(chiSquare < 20.5, `chi-square ${chiSquare} with ${JSON.stringify(filters)}`);
    assert.ok(
      counts.every((count) => count === 0),
      "nothing else comes",
    );
  }
});

void test("sampler: the same seed gives the same tokens, another seed others", () => {
  const logits = aModelRow(1000);
  const tokensOf = (seed: number): number[] => {
    const sampling = { ...GREEDY, temperature: 1.5 };
    const sampler = new Sampler(sampling, { vocabularySize: 1000, promptTokenIds: new Uint32Array(0), seed });
    return Array.from({ length: 20 }, () => sampler.sample(logits));
  };
  assert.deepEqual(tokensOf(1), tokensOf(1));
  assert.notDeepEqual(tokensOf(1), tokensOf(2));
});

void test("sampler: greedy takes the lowest id among equals", () => {
  const sampler = new Sampler(GREEDY, { vocabularySize: 9, promptTokenIds: new Uint32Array(0), seed: 1 });
  assert.equal(sampler.sample(Float32Array.from([0, 1, 3, 3, 2, 3, 0, 1, 3])), 2);
});

void test("sampler: rows without a usable logit give token 0, an infinite logit wins", () => {
  for (const temperature of [0, 1, 1e-320]) {
    for (const filters of [{}, { topK: 2 }, { topP: 0.5 }, { minP: 0.5 }]) {
      const sampling = { ...GREEDY, temperature, ...filters };
      const sampler = new Sampler(sampling, { vocabularySize: 5, promptTokenIds: new Uint32Array(0), seed: 1 });
      assert.equal(sampler.sample(new Float32Array(5).fill(NaN)), 0);
      assert.equal(sampler.sample(new Float32Array(5).fill(-Infinity)), 0);
      assert.equal(sampler.sample(Float32Array.of(1, NaN, Infinity, 2, -Infinity)), 2);
      assert.equal(sampler.sample(Float32Array.of(NaN, NaN, NaN, -50, NaN)), 3);
    }
  }
});

void test("sampler: penalties count the output, the repetition penalty the prompt too", () => {
  const promptTokenIds = Uint32Array.of(0);
  const logits = Float32Array.of(3, 2.9, 2.8);
  const repeated = new Sampler({ ...GREEDY, repetitionPenalty: 1.2 }, { vocabularySize: 3, promptTokenIds, seed: 1 });
  assert.equal(repeated.sample(logits), 1);
  const frequent = new Sampler({ ...GREEDY, frequencyPenalty: 0.15 }, { vocabularySize: 3, promptTokenIds, seed: 1 });
  const tokens = Array.from({ length: 3 }, () => {
    const token = frequent.sample(logits);
    frequent.accept(token);
    return token;
  });
  assert.deepEqual(tokens, [0, 1, 0]);
});

void test("sampler: logprobs are those of the unmodified distribution", () => {
  fc.assert(
    fc.property(aRow, fc.nat(), fc.nat(20), (logits, pick, top) => {
      const tokenId = pick % logits.length;
      const actual = promptLogprob(logits, tokenId, top);
      if (!logits.some((logit) => logit > -Infinity)) {
        assert.deepEqual(actual, { logprob: -9999, topIds: [], topLogprobs: [] });
        return;
      }
      const expected = naiveLogprob(logits, tokenId, top);
      assert.deepEqual(actual.topIds, expected.topIds);
      const logprobs = [expected.logprob, ...expected.topLogprobs];
      [actual.logprob, ...actual.topLogprobs].forEach((logprob, i) => {
        assert.ok(Math.abs(logprob - logprobs[i]!) < 1e-5, `${logprob} instead of ${logprobs[i]}`);
      });
    }),
  );
  const sampling = { ...GREEDY, temperature: 2, logitBias: [[1, 50]] as const };
  const sampler = new Sampler(sampling, { vocabularySize: 2, promptTokenIds: new Uint32Array(0), seed: 1 });
  assert.ok(Math.abs(sampler.logprobs(Float32Array.of(0, 0), 1, 0).logprob + Math.LN2) < 1e-6);
});

void test("sampler: one that resumes behind any token goes on as the one that drew them all", () => {
  fc.assert(
    fc.property(
      aRow,
      someSampling,
      fc.nat(0xffffffff),
      fc.array(fc.nat(750), { maxLength: 10 }),
      fc.nat(12),
      (logits, sampling, seed, prompt, cut) => {
        const options = { vocabularySize: logits.length, promptTokenIds: Uint32Array.from(prompt), seed };
        const whole = new Sampler(sampling, options);
        const tokens = Array.from({ length: 12 }, () => {
          const token = whole.sample(logits);
          whole.accept(token);
          return token;
        });
        const resumed = new Sampler(sampling, { ...options, resumedTokenIds: Uint32Array.from(tokens.slice(0, cut)) });
        for (const token of tokens.slice(cut)) {
          assert.equal(resumed.sample(logits), token);
          resumed.accept(token);
        }
      },
    ),
    { numRuns: 200 },
  );
});
