import assert from "node:assert/strict";
import { describe, test } from "node:test";
import type { PreprocessedRequest } from "../../protocol/index.ts";
import type { TransferTicket } from "../base.ts";
import type { SglangEngineConfig } from "../config.ts";
import { aRequest } from "../engine.recorder.ts";
import { OPTIONS, SIZES, promptOf } from "../foreign/faults.battery.ts";
import { EngineWatcher, until, withEngine } from "../foreign/fixtures/engine-watcher.ts";
import type { ForeignEngine } from "../foreign/index.ts";
import { FakeSglang, type FakeSglangOptions } from "./fixtures/fake-sglang.ts";
import { createSglangEngine } from "./sglang-engine.ts";

/** SGLang's prefill and decode servers as the two legs of a request. Over fake servers, never real ones. */
const LIMIT = { timeout: 60_000 };

interface Side {
  readonly fake: FakeSglang;
  readonly engine: ForeignEngine;
  readonly watcher: EngineWatcher;
}

function configOf(url: string, role: "prefill" | "decode"): SglangEngineConfig {
  return {
    kind: "sglang",
    url,
    role,
    kvTransferConfig: "nixl",
    vocabularySize: 4_096,
    startTimeoutMs: 10_000,
    kvEvents: false,
    maxSequences: 8,
    maxBatchedTokens: 512,
    contextLength: 0,
    blockSizeTokens: 0,
    metricsIntervalMs: 20,
  };
}

/** The two legs, as their workers begin them. */
function begin(prefill: Side, request: PreprocessedRequest) {
  const { id, result } = prefill.watcher.submitBy((one) => prefill.engine.transfer!.submitPrefill(one, { ...request }));
  assert.ok(result !== undefined, "the ticket is there before the prompt is computed");
  return { id, ticket: result };
}

function goOn(decode: Side, request: PreprocessedRequest, ticket: TransferTicket): number {
  return decode.watcher.submitBy((one) => decode.engine.transfer!.submitDecode(one, { ...request }, ticket)).id;
}

async function withPair(
  options: FakeSglangOptions,
  body: (prefill: Side, decode: Side) => Promise<void>,
): Promise<void> {
  const sides: Side[] = [];
  try {
    for (const role of ["prefill", "decode"] as const) {
      const fake = new FakeSglang({ ...SIZES, ...options, disaggregation: role, bootstrapPort: 9_001 });
      const engine = await createSglangEngine(configOf(await fake.listen(), role), OPTIONS);
      const watcher = new EngineWatcher(engine);
      sides.push({ fake, engine, watcher });
      const info = await watcher.start();
      assert.equal(info.kvConnector, "sglang-nixl");
    }
    await body(sides[0]!, sides[1]!);
  } finally {
    for (const { fake, watcher } of sides) {
      await watcher.stop();
      await fake.close();
    }
  }
}

describe("SGLang split over two servers", () => {
  test("both get one request with one room, at once; the decode server answers, from the first token on", LIMIT, () =>
    withPair({}, async (prefill, decode) => {
      const request = { ...aRequest(promptOf(40), { stop: { maxTokens: 6 } }), requestId: "r" };
      const whole = new FakeSglang(SIZES);
      const alone = await createSglangEngine({ ...configOf(await whole.listen(), "decode"), role: "agg" }, OPTIONS);
      let wanted: readonly number[] = [];
      await withEngine(alone, async (watcher) => void (wanted = (await watcher.run({ ...request })).tokens));
      await whole.close();

      assert.equal(prefill.engine.transfer!.takesFirstToken(request), false);
      const { id: one, ticket } = begin(prefill, request);
      assert.deepEqual(
        Object.keys(ticket.parameters).toSorted((a, b) => (a < b ? -1 : 1)),
        ["host", "port", "room"],
      );
      // As it comes over the wire.
      const carried = JSON.parse(JSON.stringify(ticket)) as typeof ticket;
      const two = goOn(decode, request, carried);
      await Promise.all([prefill.watcher.ended([one]), decode.watcher.ended([two])]);
      assert.deepEqual([decode.watcher.record(two).tokens, decode.watcher.record(two).finish], [wanted, "length"]);
      assert.equal(prefill.watcher.record(one).finish, "length");
      const [body, other] = [prefill, decode].map(({ fake }) => fake.requests.at(-1)!.body);
      const { rid: _body, ...first } = body!;
      const { rid: _other, ...second } = other!;
      assert.deepEqual(second, first);
      assert.deepEqual([first.bootstrap_host, first.bootstrap_port], ["127.0.0.1", 9_001]);
      assert.match(String(ticket.parameters["room"]), /^\d{1,19}$/);
      assert.ok(BigInt(ticket.parameters["room"] as string) < 1n << 63n);
    }),
  );

  test("another room for every attempt of a request", LIMIT, () =>
    withPair({}, async ({ engine }) => {
      const request = aRequest(promptOf(8));
      const rooms = [1, 2].map((id) => engine.transfer!.submitPrefill(id, { ...request })!.parameters["room"]);
      assert.notEqual(rooms[0], rooms[1]);
      for (const id of [1, 2]) engine.abort(id);
      await Promise.resolve();
    }),
  );

  test("the decode leg's prefill rank goes along", LIMIT, () =>
    withPair({ dataParallelSize: 2 }, async (prefill, decode) => {
      const request = { ...aRequest(promptOf(8), { stop: { maxTokens: 2 } }), dpRank: 1 };
      const { ticket } = begin(prefill, request);
      await decode.watcher.ended([goOn(decode, { ...request, dpRank: 0 }, ticket)]);
      const { body } = decode.fake.requests.at(-1)!;
      assert.deepEqual([body.routed_dp_rank, body.disagg_prefill_dp_rank], [0, 1]);
    }),
  );

  test("a leg that is ended leaves nothing behind at its server, so that its worker can end the other", LIMIT, () =>
    withPair({ stepMs: 5 }, async (prefill, decode) => {
      const request = aRequest(promptOf(40), { stop: { maxTokens: 300 } });
      const { id, ticket } = begin(prefill, request);
      // Nobody comes for it.
      prefill.watcher.abort(id);
      await prefill.watcher.ended([id]);
      const other = goOn(decode, request, ticket);
      decode.watcher.abort(other);
      await decode.watcher.ended([other]);
      const finishes = [prefill.watcher.record(id).finish, decode.watcher.record(other).finish];
      assert.deepEqual(finishes, ["cancelled", "cancelled"]);
      await until(() => decode.fake.runningCount + prefill.fake.runningCount === 0, "the servers");
    }),
  );

  test("whole requests are refused by either, with what to do", LIMIT, () =>
    withPair({}, async (prefill, decode) => {
      for (const { watcher, fake } of [prefill, decode]) {
        const { error } = await watcher.run(aRequest(promptOf(8)));
        assert.equal(error?.reason, "transfer-no-path");
        assert.match(error.diagnostic ?? error.publicMessage, /does no whole requests|--disagg always/);
        assert.equal(fake.requests.length, 0);
      }
    }),
  );

  test("a server that was started for something else is refused at the start", LIMIT, async () => {
    for (const [there, pattern] of [
      ["null", /was started for whole requests; start it with --disaggregation-mode prefill/],
      ["decode", /was started with --disaggregation-mode decode; start this worker with the same/],
    ] as const) {
      const fake = new FakeSglang({ ...SIZES, disaggregation: there });
      const engine = await createSglangEngine(configOf(await fake.listen(), "prefill"), OPTIONS);
      const watcher = new EngineWatcher(engine);
      await assert.rejects(watcher.start(), pattern);
      await watcher.stop();
      await fake.close();
    }
    await assert.rejects(
      createSglangEngine({ ...configOf("http://127.0.0.1:1", "prefill"), kvTransferConfig: "NixlConnector" }, OPTIONS),
      /--kv-transfer-config: expected SGLang's name of a transfer backend \(mooncake, nixl, ascend\)/,
    );
  });
});
