import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, describe, test } from "node:test";
import { ClusterView } from "../../src/cli/cluster-view.ts";
import type { VllmEngineConfig } from "../../src/engines/index.ts";
import { FakeVllm, type FakeVllmOptions } from "../../src/engines/vllm/fixtures/fake-vllm.ts";
import type { FrontendConfig } from "../../src/frontend/index.ts";
import { DEFAULT_HANDOFF, type HandoffConfig, type RunningWorker } from "../../src/worker/index.ts";
import { byteModelFolder } from "../helpers/byte-model.ts";
import { startInProcessCluster, until, type InProcessCluster } from "../helpers/in-process-cluster.ts";

/**
 * Disaggregated serving with vLLM servers that move the blocks themselves, over the fake server, whose blocks have what the
 * real one's have: a lease, one reader, and no refusal of who comes late or twice, who gets whatever is in them by then. Its
 * answers follow from the tokens that the blocks hold, so that a foreign block shows in the text. With real servers:
 * `vllm-disaggregation-real.test.ts`.
 */
const LIMIT = { timeout: 60_000 };
const BLOCK = 16;
const FAKE: FakeVllmOptions = {
  contextLength: 2_048,
  blockSize: BLOCK,
  totalBlocks: 512,
  maxSequences: 8,
  devMode: false,
};
const PROMPT = "a prompt that is long enough for some blocks of sixteen tokens each, one byte a token. ".repeat(3);
const TOKENS = 12;
const CONNECTORS = { pull: "NixlConnector", push: "NixlPushConnector" } as const;

let modelPath: string;
let root: string;
before(() => {
  root = mkdtempSync(join(tmpdir(), "vllm-disagg-"));
  modelPath = byteModelFolder(root);
});
after(() => rmSync(root, { recursive: true, force: true }));

interface Node {
  readonly fake: FakeVllm;
  readonly worker: RunningWorker;
}

interface Split {
  readonly choice: string;
  readonly fallback: string | null;
  readonly handoff: {
    readonly blocks: number;
    readonly pull: { readonly outcome: string; readonly backend: string; readonly pulled_blocks: number; readonly bytes: number; readonly ms: number } | null;
    readonly first_to_second_token_ms: number | null;
  } | null;
} // prettier-ignore

interface Pair {
  readonly cluster: InProcessCluster;
  readonly prefill: Node;
  readonly decode: Node;
  ask(body?: object, options?: { readonly signal?: AbortSignal; readonly id?: string }): Promise<Response>;
  text(body?: object): Promise<string>;
  explain(id?: string): Promise<Split>;
  metric(name: string): Promise<Record<string, number>>;
}

interface Setup {
  readonly mode?: "pull" | "push";
  readonly fake?: FakeVllmOptions;
  readonly prefillFake?: FakeVllmOptions;
  readonly hasNoConnector?: boolean;
  /** vLLM's own lease, of whole seconds there. */
  readonly engineLeaseMs?: number;
  readonly handoff?: Partial<HandoffConfig>;
  readonly frontend?: Partial<FrontendConfig>;
}

async function withPair(setup: Setup, body: (pair: Pair) => Promise<void>): Promise<void> {
  const { mode = "pull", engineLeaseMs } = setup;
  const cluster = await startInProcessCluster({
    workers: 0,
    frontend: { disagg: "always", namespace: "dynamo", ...setup.frontend },
    worker: { modelName: "bytes" },
  });
  const fakes: FakeVllm[] = [];
  const add = async (role: "prefill" | "decode"): Promise<Node> => {
    const nixl = { mode, ...(engineLeaseMs === undefined ? {} : { leaseMs: engineLeaseMs }) };
    const fake = new FakeVllm({ ...FAKE, ...(setup.hasNoConnector === true ? {} : { nixl }), ...setup.fake, ...(role === "prefill" ? setup.prefillFake : {}) });
    fakes.push(fake);
    const kv = { kv_connector: CONNECTORS[mode], kv_role: role === "prefill" ? "kv_producer" : "kv_consumer" };
    const lease = engineLeaseMs === undefined ? {} : { kv_connector_extra_config: { kv_lease_duration: engineLeaseMs / 1_000 } };
    const engine: VllmEngineConfig = {
      kind: "vllm",
      url: await fake.listen(),
      modelPath,
      vocabularySize: 4_096,
      startTimeoutMs: 10_000,
      kvEvents: false,
      metricsIntervalMs: 20,
      maxSequences: 8,
      maxBatchedTokens: 512,
      contextLength: 0,
      blockSizeTokens: 0,
      role,
      kvTransferConfig: JSON.stringify({ ...kv, ...lease }),
    };
    const worker = await cluster.addWorker({
      engine,
      role,

      handoff: { ...DEFAULT_HANDOFF, ...setup.handoff },
    });
    return { fake, worker };
  }; // prettier-ignore
  try {
    const prefill = await add("prefill");
    const decode = await add("decode");
    await cluster.settled(2);
    await body(pairOf(cluster, prefill, decode));
    await nothingIsLeft([prefill, decode]);
  } finally {
    await cluster.stop();
    for (const fake of fakes) await fake.close();
  }
}

function pairOf(cluster: InProcessCluster, prefill: Node, decode: Node): Pair {
  const ask: Pair["ask"] = (body = {}, { signal, id } = {}) =>
    fetch(`${cluster.baseUrl}/v1/completions`, {
      method: "POST",
      headers: { "content-type": "application/json", ...(id === undefined ? {} : { "x-request-id": id }) },
      body: JSON.stringify({ model: "bytes", prompt: PROMPT, max_tokens: TOKENS, temperature: 0, ignore_eos: true, ...body }),
      ...(signal === undefined ? {} : { signal }),
    }); // prettier-ignore
  const metric: Pair["metric"] = async (name) => {
    const text = await (await fetch(`${cluster.baseUrl}/metrics`)).text();
    const found: Record<string, number> = {};
    for (const line of text.split("\n")) {
      if (line.startsWith(`${name}{`) || line.startsWith(`${name} `)) found[line.slice(0, line.lastIndexOf(" "))] = Number(line.slice(line.lastIndexOf(" ") + 1));
    }
    return found;
  }; // prettier-ignore
  return {
    cluster,
    prefill,
    decode,
    ask,
    metric,
    text: async (body) => {
      const response = await ask(body);
      const answer = (await response.json()) as { choices: { text: string }[] };
      assert.equal(response.status, 200, JSON.stringify(answer));
      return answer.choices.map(({ text }) => text).join("|");
    },
    explain: async (id = "r") => {
      const response = await fetch(`${cluster.baseUrl}/v1/route/explain/${id}`);
      const { disaggregation } = (await response.json()) as { disaggregation: Split[] };
      return disaggregation[0]!;
    },
  };
}

async function nothingIsLeft(nodes: readonly Node[]): Promise<void> {
  const isQuiet = ({ fake, worker }: Node): boolean =>
    worker.load().runningRequests + worker.load().waitingRequests === 0 && fake.runningCount + fake.waitingCount === 0;
  await until(() => Promise.resolve(nodes.every((node) => isQuiet(node))), "all streams to be over");
}

/** What one server answers that does all of it. */
async function whole(body: object = {}): Promise<string> {
  let text = "";
  await withPair({ frontend: { disagg: "never" } }, async (pair) => {
    text = await pair.text(body);
    assert.equal(pair.prefill.fake.requests.filter(({ body: { request_id } }) => !isProbe(request_id)).length, 0);
  });
  return text;
}

function isProbe(id: string | undefined): boolean {
  return id === undefined || id.startsWith("dynamo-probe") || id.startsWith("canary");
}

const lastBody = (fake: FakeVllm) => fake.requests.at(-1)!.body;
const prompted = (length: number): string => "0123456789abcdef".repeat(Math.ceil(length / 16)).slice(0, length);

describe("vLLM, a request over two servers", LIMIT, () => {
  for (const mode of ["pull", "push"] as const) {
    test(`nixl-${mode}: the same text as one server's, at every length around a block's end`, async () => {
      for (const length of [BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, 2 * BLOCK + 1, 100, 6 * BLOCK]) {
        const body = { prompt: prompted(length) };
        const wanted = await whole(body);
        await withPair({ mode }, async (pair) => {
          assert.equal(await pair.text(body), wanted, `${length} tokens`);
          assert.equal(pair.decode.fake.nixl!.transfers, 1);
          // The token that went out is a part of the prompt there: its last one, and computed there.
          assert.equal(pair.decode.fake.externalTokens, length + 1);
          assert.equal(pair.prefill.fake.nixl!.keptRequests, 1, "the probe's block, until its lease is over");
        });
      }
    });
  }

  test("what the servers are sent: no stream and one token to the first, its parameters once and unchanged to the second", async () => {
    await withPair({}, async (pair) => {
      const response = await pair.ask({ min_tokens: 5, logprobs: 2 }, { id: "r" });
      assert.equal(response.status, 200);
      await response.text();
      const first = lastBody(pair.prefill.fake);
      assert.equal(first.stream, undefined);
      assert.equal(first.sampling_params!.max_tokens, 1);
      assert.ok((first.sampling_params!.min_tokens ?? 0) <= 1, "more than the tokens that are asked for is refused");
      const asked = { do_remote_decode: true, do_remote_prefill: false };
      assert.deepEqual(first.kv_transfer_params, asked);
      assert.deepEqual(first.sampling_params!.extra_args, { kv_transfer_params: asked });
      const second = lastBody(pair.decode.fake);
      assert.equal(second.stream, true);
      const params = second.kv_transfer_params!;
      assert.equal(params.remote_engine_id, pair.prefill.fake.nixl!.engineId);
      assert.equal(params.do_remote_prefill, true);
      assert.deepEqual(second.sampling_params!.extra_args, { kv_transfer_params: params });
      // Connectors that push pair the two by it; a client's own id may come twice.
      assert.match(first.request_id!, /^r\.[0-9a-f]+$/);
      assert.equal(second.request_id, first.request_id);
      assert.equal(pair.decode.fake.requests.at(-1)!.headers["x-request-id"], first.request_id);
    });
  });

  test("explained: connector, blocks, bytes and the time to the decode server's first token; pairs and metrics", async () => {
    await withPair({}, async (pair) => {
      await pair.text();
      // Bytes of a block are learnt from what the server counts.
      const { fake } = pair.decode;
      await until(() => Promise.resolve(fake.nixl!.bytesRead > 0 && (pair.decode.worker.engineHandoffs?.transfer.blockBytes ?? 0) > 0), "the bytes"); // prettier-ignore
      await (await pair.ask({ prompt: `Another: ${PROMPT}` }, { id: "r" })).text();
      const split = await pair.explain();
      assert.equal(split.choice, "split");
      assert.equal(split.fallback, null);
      const { pull, blocks, first_to_second_token_ms: gap } = split.handoff!;
      assert.equal(blocks, Math.ceil((PROMPT.length + 9) / BLOCK));
      assert.equal(pull!.outcome, "pulled");
      assert.equal(pull!.backend, "nixl-pull");
      assert.equal(pull!.pulled_blocks, blocks);
      assert.equal(pull!.bytes, blocks * 1_024);
      assert.ok(pull!.ms > 0 && gap !== null && gap > 0);
      const seconds = await pair.metric("dynamo_frontend_disagg_handoff_seconds_count");
      assert.equal(Object.values(seconds)[0], 2);
      const { discovery, events } = pair.cluster.planes();
      const view = new ClusterView();
      await view.open(discovery, events, "dynamo");
      const rows = () => view.instances().flatMap(({ transfers }) => transfers ?? []);
      await until(
        () => Promise.resolve(rows().some(({ transferCount }) => transferCount === 2)),
        "the pair to be told",
      );
      const [row] = rows();
      assert.equal(row!.backend, "nixl-pull");
      assert.equal(row!.peer, `dynamo.backend.${pair.prefill.worker.instanceId}`);
      await view.close();
    });
  });

  test("where the first token hangs on more than the prompt, the second server tells it: the same as one server's", async () => {
    for (const body of [
      { temperature: 1, seed: 7 },
      { temperature: 0, presence_penalty: 0.5 },
      { temperature: 1, seed: 7, n: 3 },
    ]) {
      const wanted = await whole(body);
      await withPair({}, async (pair) => {
        assert.equal(await pair.text(body), wanted, JSON.stringify(body));
        const count = body.n ?? 1;
        assert.equal(pair.decode.fake.nixl!.transfers, count);
        assert.equal(pair.decode.fake.externalTokens, count * PROMPT.length);
        const first = lastBody(pair.prefill.fake);
        assert.equal(first.sampling_params!.stop_token_ids, undefined);
      });
    }
  });

  test("a stop token that is the first one ends the answer where it was found", async () => {
    const stop: FakeVllmOptions = { nextToken: () => 257 };
    const wanted: string[] = [];
    for (const disagg of ["never", "always"] as const) {
      await withPair({ fake: stop, frontend: { disagg } }, async (pair) => {
        wanted.push(await pair.text({ ignore_eos: false, stop_token_ids: [257] }));
        assert.equal(pair.decode.fake.nixl!.transfers, 0);
      });
    }
    assert.deepEqual(wanted, ["", ""]);
  });
});

describe("vLLM, a handoff that goes wrong: one use, one lease, and the answer all the same", LIMIT, () => {
  test("the fake server's hazard is real: used twice, or late, its blocks are another prompt's", async () => {
    await withPair({ engineLeaseMs: 30_000 }, async ({ prefill, decode }) => {
      const url = (node: Node): string => (node.worker.describe() as { url: string }).url;
      const post = async (node: Node, tokens: number[], kv: object, max = 4) => {
        const response = await fetch(`${url(node)}/inference/v1/generate`, {
          method: "POST",
          body: JSON.stringify({ token_ids: tokens, sampling_params: { max_tokens: max, temperature: 0 }, kv_transfer_params: kv }),
        });
        return (await response.json()) as { choices: { token_ids: number[] }[]; kv_transfer_params: object };
      }; // prettier-ignore
      const tokens = Array.from({ length: 40 }, (_, i) => 50 + i);
      const asked = { do_remote_decode: true };
      const { kv_transfer_params: params } = await post(prefill, tokens, asked, 1);
      const right = (await post(decode, tokens, params)).choices[0]!.token_ids;
      await post(prefill, tokens.map((id) => id + 1), asked, 1); // prettier-ignore
      const again = (await post(decode, tokens, params)).choices[0]!.token_ids;
      assert.notDeepEqual(again, right, "answered, from foreign blocks");
      assert.equal(prefill.fake.nixl!.staleReads, 1);
    });
  });

  test("a handoff is granted once: whoever comes with it again computes", async () => {
    const wanted = await whole();
    await withPair({}, async (pair) => {
      const handoffs: string[] = [];
      const { engineHandoffs } = pair.decode.worker;
      const take = engineHandoffs!.take.bind(engineHandoffs);
      engineHandoffs!.take = (handoff) => {
        handoffs.push(handoff);
        return take(handoff);
      };
      assert.equal(await pair.text(), wanted);
      await assert.rejects(take(handoffs[0]!), /claimed before, or are not kept/);
      // The same one in the next request: not a word of it reaches the engine.
      engineHandoffs!.take = () => take(handoffs[0]!);
      assert.equal(await (await pair.ask({}, { id: "r" })).text().then((text) => (JSON.parse(text) as { choices: { text: string }[] }).choices[0]!.text), wanted); // prettier-ignore
      const split = await pair.explain();
      assert.equal(split.handoff!.pull!.outcome, "handoff-gone");
      assert.equal(split.fallback, "handoff-gone");
      assert.equal(lastBody(pair.decode.fake).kv_transfer_params, undefined);
      assert.equal(pair.prefill.fake.nixl!.staleReads, 0);
      const fallbacks = await pair.metric("dynamo_frontend_disagg_fallbacks_total");
      assert.equal(Object.entries(fallbacks).find(([name]) => name.includes("handoff-gone"))?.[1], 1);
    });
  });

  for (const [what, setup] of Object.entries({
    "the worker's lease": { handoff: { leaseMs: 40 } },
    "the engine's lease": { engineLeaseMs: 80 },
  } satisfies Record<string, Setup>)) {
    test(`${what} is over before the decode worker comes: computed, from no foreign block`, async () => {
      const wanted = await whole();
      await withPair(setup, async (pair) => {
        const { engineHandoffs } = pair.decode.worker;
        const take = engineHandoffs!.take.bind(engineHandoffs);
        engineHandoffs!.take = async (handoff) => {
          await until(() => Promise.resolve(pair.prefill.worker.engineHandoffs!.heldBlocks === 0), "the lease to end");
          return take(handoff);
        };
        const response = await pair.ask({}, { id: "r" });
        assert.equal(((await response.json()) as { choices: { text: string }[] }).choices[0]!.text, wanted);
        assert.equal((await pair.explain()).fallback, "handoff-gone");
        assert.equal(pair.decode.fake.nixl!.transfers, 0);
        assert.equal(pair.prefill.fake.nixl!.staleReads, 0);
      });
    });
  }

  test("the decode server answers 500 for the blocks: the same worker computes, and says so", async () => {
    const wanted = await whole();
    await withPair({}, async (pair) => {
      pair.decode.fake.failNextTransfers = 1;
      const response = await pair.ask({}, { id: "r" });
      assert.equal(((await response.json()) as { choices: { text: string }[] }).choices[0]!.text, wanted);
      const split = await pair.explain();
      assert.equal(split.handoff!.pull!.outcome, "engine-failed");
      assert.equal(split.handoff!.pull!.pulled_blocks, 0);
      assert.equal(split.fallback, "engine-failed");
      assert.equal(lastBody(pair.decode.fake).kv_transfer_params, undefined);
      assert.equal(
        await pair.text({ prompt: `Once more. ${PROMPT}` }),
        await whole({ prompt: `Once more. ${PROMPT}` }),
      );
      assert.equal(pair.decode.fake.nixl!.transfers, 1);
    });
  });

  test("the prefill server is killed between the legs: computed by the decode worker", async () => {
    const wanted = await whole();
    await withPair({}, async (pair) => {
      const { engineHandoffs } = pair.decode.worker;
      const take = engineHandoffs!.take.bind(engineHandoffs);
      engineHandoffs!.take = async (handoff) => {
        const taken = await take(handoff);
        await pair.prefill.fake.close();
        return taken;
      };
      const response = await pair.ask({}, { id: "r" });
      assert.equal(((await response.json()) as { choices: { text: string }[] }).choices[0]!.text, wanted);
      assert.equal((await pair.explain()).fallback, "engine-failed");
      assert.equal(pair.decode.fake.nixl!.failedTransfers, 1);
      engineHandoffs!.take = take;
      // Nobody prefills any more: the decode worker has it whole.
      assert.equal(await pair.text({ prompt: `${PROMPT}!` }), await whole({ prompt: `${PROMPT}!` }));
    });
  });

  test("the prefill worker is gone between the legs: not granted, computed", async () => {
    const wanted = await whole();
    await withPair({}, async (pair) => {
      const address = await pair.cluster.addressOf(pair.prefill.worker.instanceId);
      const { engineHandoffs } = pair.decode.worker;
      const take = engineHandoffs!.take.bind(engineHandoffs);
      engineHandoffs!.take = (handoff) => {
        pair.cluster.kill(address);
        return take(handoff);
      };
      const response = await pair.ask({}, { id: "r" });
      assert.equal(((await response.json()) as { choices: { text: string }[] }).choices[0]!.text, wanted);
      assert.match((await pair.explain()).fallback!, /^worker-(?:lost|unreachable)$/);
      assert.equal(pair.decode.fake.nixl!.transfers, 0);
    });
  });

  test("the blocks do not come: after the time for it the engine lets go, and computes", async () => {
    const wanted = await whole();
    await withPair({ handoff: { pullTimeoutMs: 60 } }, async (pair) => {
      pair.decode.fake.isTransferHung = true;
      const response = await pair.ask({}, { id: "r" });
      assert.equal(((await response.json()) as { choices: { text: string }[] }).choices[0]!.text, wanted);
      assert.equal((await pair.explain()).fallback, "first-token-timeout");
    });
  });

  test("prefill answered 500, or its server hangs up: the decode worker has it whole", async () => {
    const wanted = await whole();
    await withPair({ prefillFake: { totalBlocks: 512 } }, async (pair) => {
      pair.prefill.fake.isStalled = true;
      const answer = pair.text();
      await until(
        () => Promise.resolve(pair.prefill.fake.waitingCount + pair.prefill.fake.runningCount > 0),
        "the prompt",
      );
      pair.prefill.fake.breakConnections();
      assert.equal(await answer, wanted);
      pair.prefill.fake.isStalled = false;
      assert.equal(pair.decode.fake.nixl!.transfers, 0);
    });
  });
});

describe("vLLM, a client that goes away: both servers stop", LIMIT, () => {
  test("while the prompt is computed", async () => {
    await withPair({}, async (pair) => {
      pair.prefill.fake.isStalled = true;
      const abort = new AbortController();
      const answer = pair.ask({ stream: true }, { signal: abort.signal }).then((response) => response.text());
      await until(() => Promise.resolve(pair.prefill.fake.waitingCount > 0), "the prompt");
      abort.abort();
      await assert.rejects(answer);
      await until(() => Promise.resolve(pair.prefill.fake.aborted === 1), "the abort");
      pair.prefill.fake.isStalled = false;
      assert.equal(pair.decode.fake.requests.filter(({ body }) => !isProbe(body.request_id)).length, 0);
    });
  });

  test("while the blocks are on their way", async () => {
    await withPair({}, async (pair) => {
      pair.decode.fake.isTransferHung = true;
      const abort = new AbortController();
      const answer = pair.ask({ stream: true }, { signal: abort.signal }).then((response) => response.text());
      await until(() => Promise.resolve(pair.decode.fake.nixl!.transfers === 1), "the transfer");
      abort.abort();
      await assert.rejects(answer);
      await until(() => Promise.resolve(pair.decode.fake.aborted === 1), "the abort");
    });
  });

  test("while it is decoded", async () => {
    await withPair({ fake: { stepMs: 5 } }, async (pair) => {
      const abort = new AbortController();
      const response = await pair.ask({ stream: true, max_tokens: 1_500 }, { signal: abort.signal });
      const reader = response.body!.getReader();
      await until(() => Promise.resolve(pair.decode.fake.runningCount === 1), "the answer");
      await reader.read();
      abort.abort();
      await until(() => Promise.resolve(pair.decode.fake.aborted === 1), "the abort");
    });
  });
});

describe("vLLM, what clients may not say, and pairs that cannot work", LIMIT, () => {
  test("fields that only our processes may send are refused by name, wherever they stand", async () => {
    await withPair({}, async (pair) => {
      const internal = ["kv_transfer_params", "ec_transfer_params", "disaggregated_params", "bootstrap_host", "bootstrap_port", "bootstrap_room", "handoff"]; // prettier-ignore
      const before = pair.prefill.fake.requests.length + pair.decode.fake.requests.length;
      for (const field of internal) {
        for (const place of ["", "nvext", "extra_args", "vllm_xargs", "extra_body"]) {
          const value = { [field]: { do_remote_prefill: true } };
          const response = await pair.ask(place === "" ? value : { [place]: value });
          assert.equal(response.status, 400, `${place}.${field}`);
          const { error } = (await response.json()) as { error: { message: string; param: string } };
          assert.ok(error.message.includes(field) || error.param?.includes(place), error.message);
        }
      }
      assert.equal(pair.prefill.fake.requests.length + pair.decode.fake.requests.length, before);
    });
  });

  test("a prefill worker beside a server without a connector, or with the other one, does not start", async () => {
    await assert.rejects(
      withPair({ hasNoConnector: true }, () => Promise.resolve()),
      /hands no blocks over; start it with --kv-transfer-config/,
    );
    await assert.rejects(
      withPair({ prefillFake: { nixl: { mode: "push" } } }, () => Promise.resolve()),
      /has NIXL's push connector, not nixl-pull; say the same here/,
    );
  });
});

test("vLLM over two servers: auto decides, and turned to never nothing is split", LIMIT, async () => {
  await withPair({ frontend: { disagg: "auto" } }, async (pair) => {
    const wanted = await pair.text();
    for (let i = 0; i < 6; i++) assert.equal(await pair.text(), wanted);
    await (await pair.ask({}, { id: "r" })).text();
    assert.match((await pair.explain()).choice, /^(?:split|decode|prefill)$/);
  });
  await withPair({ frontend: { disagg: "never" } }, async (pair) => {
    await pair.text();
    assert.equal(pair.decode.fake.nixl!.transfers, 0);
  });
});
