import assert from "node:assert/strict";
import { test } from "node:test";
import { MAX_REPORTED_PAIRS, parseTransferReport, type TransferReport } from "../protocol/index.ts";
import { ManualClock } from "../std/index.ts";
import type { PairTelemetry } from "../transfer/index.ts";
import { publishTransfers } from "./publish-transfers.ts";

const PAIR: PairTelemetry = {
  peer: "dynamo.backend.0123456789abcdef",
  backend: "shm",
  operation: "read",
  reason: "the fastest that both agents have",
  isSlowPath: false,
  isSlow: false,
  transferCount: 2,
  byteCount: 3e6,
  descriptorCount: 9,
  seconds: 0.001,
  errorCount: 0,
  lastGigabytesPerSecond: 2.345678,
  meanGigabytesPerSecond: 3,
};

function published(telemetry: () => PairTelemetry[]): {
  reports: TransferReport[];
  clock: ManualClock;
  stop: () => void;
} {
  const clock = new ManualClock();
  const reports: TransferReport[] = [];
  const publisher = {
    publisherId: "",
    publish: (payload: Uint8Array) => reports.push(parseTransferReport(payload)!),
    close: () => Promise.resolve(),
  };
  return { reports, clock, stop: publishTransfers(publisher, { telemetry }, "me", clock) };
}

test("transfer reports: at once, then when something changed, and no more after the stop", () => {
  let pairs: PairTelemetry[] = [];
  const { reports, clock, stop } = published(() => pairs);
  assert.deepEqual(reports, [{ instanceId: "me", pairs: [] }]);
  clock.advance(10_000);
  assert.equal(reports.length, 1);
  pairs = [PAIR];
  clock.advance(2_000);
  const { descriptorCount: _count, seconds: _seconds, ...told } = PAIR;
  assert.deepEqual(reports[1]!.pairs, [{ ...told, lastGigabytesPerSecond: 2.346 }]);
  stop();
  pairs = [];
  clock.advance(10_000);
  assert.equal(reports.length, 2);
  assert.equal(clock.pendingTimerCount, 0);
});

test("transfer reports: of many pairs those that moved most", () => {
  const many = Array.from({ length: 100 }, (_, i) => ({ ...PAIR, peer: `ns.c.${i}`, byteCount: i }));
  const { reports, stop } = published(() => many);
  stop();
  assert.equal(reports[0]!.pairs.length, MAX_REPORTED_PAIRS);
  assert.equal(reports[0]!.pairs[0]!.byteCount, 99);
});

test("transfer reports: foreign bytes are a report or nothing", () => {
  const { reports, stop } = published(() => [PAIR]);
  stop();
  const [pair] = reports[0]!.pairs;
  const encode = (value: unknown): Buffer => Buffer.from(JSON.stringify(value));
  assert.deepEqual(parseTransferReport(encode(reports[0])), reports[0]);
  const pairs = Array.from({ length: MAX_REPORTED_PAIRS + 1 }, () => pair);
  const wrong = [null, {}, { instanceId: 1, pairs: [] }, { instanceId: "me", pairs: {} }, { instanceId: "me", pairs }];
  for (const value of wrong) assert.equal(parseTransferReport(encode(value)), undefined);
  for (const field of Object.keys(pair!)) {
    assert.equal(parseTransferReport(encode({ instanceId: "me", pairs: [{ ...pair, [field]: null }] })), undefined);
  }
});
