import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { ManualClock } from "../../std/index.ts";
import { LineFit } from "./line-fit.ts";
import { SplitAdvisor, type SplitMode } from "./split-advisor.ts";

const IDLE = { cachedTokens: 0, queuedTokens: 0, activeRequests: 0, rankCount: 1 };

/** A prefill worker with a few answers of its own does not take whole requests. */
const LONG = { promptTokens: 1_000, outputTokens: 20, decode: IDLE, prefill: IDLE };

function newAdvisor(mode: SplitMode = "auto"): { advisor: SplitAdvisor; clock: ManualClock } {
  const clock = new ManualClock();
  const advisor = new SplitAdvisor({ mode, clock, blockSizeTokens: 16, blockBytes: 100_000 });
  for (let i = 0; i < 50; i++) {
    clock.advance(1_000);
    advisor.sawPrefill("prefill", "p", 1_000, 1_000);
    advisor.sawPrefill("decode", "d", 1_000, 1_000);
    advisor.sawStep(1 + (i % 4), 10 + (i % 4) * 2);
    advisor.sawHandoff((i % 5) * 20, 30 + (i % 5) * 20 * 0.5 + advisor.stepMs(1));
    advisor.sawOutput(20);
  }
  // Long ago, but for one that was split just now: nothing is tried for news.
  clock.advance(200_000);
  advisor.decide({ ...LONG, prefill: { ...IDLE, cachedTokens: 992, activeRequests: 60 } });
  return { advisor, clock };
}

test("advisor: an idle decode worker keeps the prompt; with answers under way, whichever costs all of them least", () => {
  const { advisor } = newAdvisor();
  assert.equal(advisor.decide(LONG).choice, "decode");
  const decode = { ...IDLE, activeRequests: 4 };
  // An idle prefill worker does all of it sooner than a handoff and four others' company would let it.
  const whole = advisor.decide({ ...LONG, decode });
  assert.equal(whole.choice, "prefill");
  assert.match(
    whole.reason,
    /^whole on a prefill worker: \d+ ms of delay; split \d+ ms, whole on a decode worker \d+ ms$/,
  );
  // One with answers of its own, too, as long as there are few.
  const busy = { ...IDLE, activeRequests: 30 };
  assert.equal(
    advisor.decide({ ...LONG, outputTokens: 500, decode: { ...IDLE, activeRequests: 2 }, prefill: busy }).choice,
    "decode",
  );
  assert.equal(advisor.decide({ ...LONG, decode: busy, prefill: { ...IDLE, activeRequests: 25 } }).choice, "prefill");
});

test("advisor: a pool without room for the answer does not get it, unless none has", () => {
  const { advisor } = newAdvisor();
  const full = { ...IDLE, hasRoom: false };
  assert.equal(advisor.decide({ ...LONG, decode: full }).choice, "prefill");
  assert.equal(advisor.decide({ ...LONG, prefill: full }).choice, "decode");
  assert.equal(advisor.decide({ ...LONG, decode: full, prefill: full }).choice, "decode");
});

test("advisor: of a prompt of several chunks only the blocks that moved late count, as far as that was seen", () => {
  const clock = new ManualClock();
  const options = { mode: "auto", clock, blockSizeTokens: 16, blockBytes: 100_000, maxBatchedTokens: 160 } as const;
  const advisor = new SplitAdvisor(options);
  const handoffOf = (promptTokens: number): number => advisor.compare({ ...LONG, promptTokens }).costs.split.handoffMs;
  for (let i = 0; i < 50; i++) advisor.sawHandoff(i % 11, 10 + (i % 11) * 2 + advisor.stepMs(1));
  const oneChunk = handoffOf(160);
  assert.ok(Math.abs(oneChunk - 30) < 1, `${oneChunk}`);
  assert.ok(handoffOf(1_600) > 200, "nothing was seen of longer ones");
  for (let i = 0; i < 50; i++) advisor.sawHandoff(10, 30 + advisor.stepMs(1), 100);
  assert.ok(Math.abs(handoffOf(1_600) - oneChunk) < 3, "all but the last chunk came early");
});

test("advisor: what is cached there, and a queue here, keep a prompt where it is; a queue there gives it away", () => {
  const { advisor } = newAdvisor();
  const decode = { ...IDLE, activeRequests: 4 };
  assert.equal(advisor.decide({ ...LONG, decode: { ...decode, cachedTokens: 992 } }).choice, "decode");
  assert.equal(advisor.decide({ ...LONG, decode, prefill: { ...IDLE, queuedTokens: 6_000 } }).choice, "decode");
  assert.equal(advisor.decide({ ...LONG, decode: { ...IDLE, queuedTokens: 2_000 } }).choice, "prefill");
});

test("advisor: a prefill worker that holds the prompt, and has answers of its own, computes it for an idle one", () => {
  const { advisor } = newAdvisor();
  const prefill = { ...IDLE, cachedTokens: 992, activeRequests: 60 };
  assert.equal(advisor.decide({ ...LONG, prefill }).choice, "split");
});

test("advisor: while prompts keep the prefill worker busy, answers belong to the decode worker", () => {
  const { advisor, clock } = newAdvisor();
  const decode = { ...IDLE, activeRequests: 4 };
  const long = { ...LONG, outputTokens: 100, decode };
  for (let i = 0; i < 60; i++) advisor.sawOutput(100);
  assert.equal(advisor.decide(long).choice, "prefill");
  for (let i = 0; i < 10; i++) {
    clock.advance(1_000);
    advisor.sawPrefill("prefill", "p", 1_000, 1_000);
  }
  assert.equal(advisor.decide(long).choice, "split");
});

test("advisor: always and never are what they say, with the costs of auto at hand", () => {
  const always = newAdvisor("always").advisor.decide(LONG);
  assert.deepEqual([always.choice, always.reason], ["split", "--disagg always"]);
  assert.ok(always.costs.split.totalMs > always.costs.decode.totalMs);
  assert.equal(
    newAdvisor("never").advisor.decide({ ...LONG, decode: { ...IDLE, activeRequests: 9 } }).choice,
    "decode",
  );
});

test("advisor: a way that was not taken for long is tried when it looks a little worse, once", () => {
  const { advisor, clock } = newAdvisor();
  clock.advance(31_000);
  const trial = advisor.decide(LONG);
  assert.equal(trial.choice, "split");
  assert.match(trial.reason, /for news/);
  assert.equal(advisor.decide(LONG).choice, "decode");
});

test("advisor: it learns the speeds and the handoff it is shown", () => {
  const { advisor, clock } = newAdvisor();
  assert.ok(Math.abs(advisor.prefillMsPerToken - 1) < 1e-9);
  const { handoffSetupMs, handoffMsPerBlock } = advisor.measured();
  assert.ok(Math.abs(handoffSetupMs - 30) < 2, `${handoffSetupMs}`);
  assert.ok(Math.abs(handoffMsPerBlock - 0.5) < 0.05, `${handoffMsPerBlock}`);
  for (let i = 0; i < 40; i++) {
    clock.advance(250);
    advisor.sawPrefill("decode", "d", 1_000, 250);
  }
  assert.ok(Math.abs(advisor.decodeMsPerToken - 0.25) < 0.01);
  advisor.sawPrefill("decode", "d", 3, 90);
  assert.ok(Math.abs(advisor.decodeMsPerToken - 0.25) < 0.01, "a prompt of some tokens says nothing of speed");
});

test("line fit: it finds the line of noisy samples, and is never negative", () => {
  fc.assert(
    fc.property(fc.double({ min: 0, max: 50, noNaN: true }), fc.double({ min: 0.01, max: 5, noNaN: true }), (a, b) => {
      const fit = new LineFit(15, 1);
      for (let i = 0; i < 400; i++) {
        const x = (i * 37) % 100;
        fit.add(x, a + b * x + (i % 2 === 0 ? 0.5 : -0.5));
      }
      assert.ok(Math.abs(fit.at(50) - (a + b * 50)) < 1, `${fit.at(50)} for ${a} + ${b} x 50`);
      assert.ok(fit.intercept >= 0 && fit.slope >= 0);
    }),
    { numRuns: 50 },
  );
  const same = new LineFit(15, 1);
  for (let i = 0; i < 200; i++) same.add(0, 40);
  assert.ok(Math.abs(same.at(0) - 40) < 1, "samples of one size move the whole line");
  assert.ok(Math.abs(same.slope - 1) < 0.01);
});
