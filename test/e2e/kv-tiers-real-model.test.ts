import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { after, before, describe, test } from "node:test";
import { promisify } from "node:util";
import OpenAI from "openai";
import type { KvTierUse } from "../../src/protocol/index.ts";
import { BUCKET, startS3Server, type S3Server } from "../../src/transfer/s3/fixtures/s3-server.ts";
import { assertSameGreedy, greedyAnswer, type GreedyToken } from "../helpers/greedy.ts";
import { until } from "../helpers/in-process-cluster.ts";
import { startProcessCluster, type ProcessCluster } from "../helpers/process-cluster.ts";

const MODEL = process.env["DYN_TEST_MODEL"];
const COMMAND = resolve(import.meta.dirname, "../../bin/dynamo.mjs");
/** At least: what is more is bookkeeping of the engine. */
const BLOCK_BYTES = 16 * 23_040;
const PROMPT =
  "The harbour master counts the boats that come in with the tide, and writes each name in the book. ".repeat(12);
const MESSAGES = [{ role: "user" as const, content: PROMPT }];

/** `dynamo local` with all tiers, as the README shows it: real processes, the real model, a real S3 server. */
describe(
  "dynamo local with KV tiers and the real model",
  { skip: MODEL === undefined ? "no test model (DYN_TEST_MODEL)" : false },
  () => {
    let folder: string;
    let server: S3Server;
    /** From the engine's own cache. */
    let expected: GreedyToken[];
    let promptBlocks = 0;

    before(async () => {
      folder = await mkdtemp(join(tmpdir(), "dynamo-tiers-e2e-"));
      server = await startS3Server();
    });
    after(async () => {
      await server?.close();
      await rm(folder, { recursive: true, force: true });
    });

    /** One life of the cluster; its discovery folder is known, so that `dynamo status` finds it. */
    async function inOneLife(flags: readonly string[], body: (life: Life) => Promise<void>): Promise<void> {
      const { accessKeyId, secretAccessKey } = server.options;
      const discovery = await mkdtemp(join(folder, "discovery-"));
      const cluster = await startProcessCluster(
        ["--model", MODEL!, "--model-name", "m", "--workers", "1", "--threads", "2", ...flags],
        { DYN_FILE_KV: discovery, AWS_ACCESS_KEY_ID: accessKeyId, AWS_SECRET_ACCESS_KEY: secretAccessKey },
      );
      try {
        await body(new Life(cluster, discovery));
      } finally {
        assert.equal(await cluster.stop("SIGINT"), 0, cluster.output());
      }
    }

    const host = ["--kv-host", "1GB"];
    const disk = (): string[] => ["--kv-disk", "4GB", "--kv-disk-path", join(folder, "disk")];
    const store = (): string[] => ["--kv-s3", `${server.options.endpoint}/${BUCKET}`];

    test("a prompt goes down to every tier, and dynamo status shows what they hold", () =>
      inOneLife([...host, ...disk(), ...store()], async (life) => {
        await life.ask();
        // The second sight sends it to disk.
        expected = await life.ask();
        promptBlocks = await life.cachedBlocks();
        assert(promptBlocks > 12, `${promptBlocks} blocks`);
        await life.untilHeld({ host: promptBlocks, disk: promptBlocks, object: promptBlocks });
        const [hostUse, diskUse] = await life.tiers();
        assert(hostUse!.capacityBytes! > 0.99e9 && hostUse!.capacityBytes! <= 1e9);
        assert(diskUse!.capacityBytes! > 3.9e9 && diskUse!.capacityBytes! <= 4e9);
        assert.match(await life.status(), /INSTANCE +KV TIER +USED +BUDGET +HITS +RESTORED +STATE/);
      }));

    test("the next life finds disk and store again, and restores the prompt from disk", () =>
      inOneLife([...host, ...disk(), ...store()], async (life) => {
        await life.untilHeld({ disk: promptBlocks, object: promptBlocks });
        await life.untilRouterSees((overlap) => overlap.disk >= promptBlocks);
        assertSameGreedy(await life.ask(), expected);
        const restored = Object.fromEntries((await life.tiers()).map((use) => [use.tier, use.restoredBlocks]));
        assert(restored["disk"]! >= promptBlocks, JSON.stringify(restored));
        assert.match(await life.status(), new RegExp(`disk .* ${restored["disk"]} blocks +ok`));
      }));

    test("a worker without that disk restores the prompt from the store", () =>
      inOneLife(store(), async (life) => {
        await life.untilHeld({ object: promptBlocks });
        await life.untilRouterSees((overlap) => overlap.shared >= promptBlocks);
        assertSameGreedy(await life.ask(), expected);
        const object = (await life.tiers()).find(({ tier }) => tier === "object")!;
        assert(object.restoredBlocks >= promptBlocks, JSON.stringify(object));
        assert(object.hitBlocks >= promptBlocks && object.hitBlocks <= object.lookedUpBlocks);
      }));

    test("the same with the store gone: the prompt is computed, and status says why", async () => {
      const flags = store();
      await server.close();
      await inOneLife(flags, async (life) => {
        assertSameGreedy(await life.ask(), expected);
        await until(async () => (await life.tiers()).some(({ isDegraded }) => isDegraded), "the store to be degraded");
        assert.match(await life.status(), /object .* degraded/);
      });
      server = await startS3Server();
    });
  },
);

interface Overlap {
  readonly disk: number;
  readonly shared: number;
}

class Life {
  readonly #cluster: ProcessCluster;
  readonly #discovery: string;
  readonly #client: OpenAI;

  constructor(cluster: ProcessCluster, discovery: string) {
    this.#cluster = cluster;
    this.#discovery = discovery;
    this.#client = new OpenAI({ baseURL: `${cluster.baseUrl}/v1`, apiKey: "none", maxRetries: 0 });
  }

  ask(): Promise<GreedyToken[]> {
    return greedyAnswer(this.#client, { model: "m", messages: MESSAGES, max_tokens: 12 });
  }

  /** Of the prompt, asked for once more. */
  async cachedBlocks(): Promise<number> {
    const answer = await this.#client.chat.completions.create({
      model: "m",
      messages: MESSAGES,
      max_tokens: 1,
      temperature: 0,
    });
    return Math.floor(answer.usage!.prompt_tokens_details!.cached_tokens! / 16);
  }

  async status(...flags: readonly string[]): Promise<string> {
    const args = [COMMAND, "status", "--once", "--file-kv", this.#discovery, ...flags];
    return (await promisify(execFile)(process.execPath, args)).stdout;
  }

  async tiers(): Promise<readonly KvTierUse[]> {
    const { instances } = JSON.parse(await this.status("--json")) as { instances: { kvTiers?: KvTierUse[] }[] };
    return instances.flatMap(({ kvTiers }) => kvTiers ?? []);
  }

  async untilHeld(blocks: Partial<Record<KvTierUse["tier"], number>>): Promise<void> {
    const isHeld = async (): Promise<boolean> => {
      const held = new Map(
        (await this.tiers()).map(({ tier, usedBytes }) => [tier as string, usedBytes / BLOCK_BYTES]),
      );
      return Object.entries(blocks).every(([tier, count]) => (held.get(tier) ?? 0) >= count);
    };
    await until(isHeld, `the tiers to hold ${JSON.stringify(blocks)}`, 90_000);
  }

  async untilRouterSees(isSo: (overlap: Overlap) => boolean): Promise<void> {
    const preview = async (): Promise<boolean> => {
      const answer = await fetch(`${this.#cluster.baseUrl}/v1/route`, {
        method: "POST",
        headers: { "content-type": "application/json" },
        body: JSON.stringify({ model: "m", messages: MESSAGES }),
      });
      const { decisions } = (await answer.json()) as {
        decisions: { candidates: { overlap_blocks: Overlap }[] }[];
      };
      return decisions[0]!.candidates.some(({ overlap_blocks }) => isSo(overlap_blocks));
    };
    await until(preview, "the router to see the blocks", 20_000);
  }
}
