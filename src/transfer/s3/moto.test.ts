import assert from "node:assert/strict";
import { after, before, test } from "node:test";
import { SeededRandom, systemClock } from "../../std/index.ts";
import { DescriptorList, TransferAgent } from "../index.ts";
import { assertReason, noise } from "../transfer.battery.ts";
import { MOTO_BUCKET as BUCKET, startMoto, type Moto } from "./fixtures/moto-server.ts";
import { S3Client, type S3Options } from "./s3-client.ts";

/** Against moto's server: signatures checked by botocore, conditional writes. */
let moto: Moto;
before(
  async () => {
    moto = await startMoto();
  },
  { timeout: 170_000 },
);
after(async () => {
  if (moto.options !== undefined) await moto.close();
});

function motoTest(
  text: string,
  run: (client: (options?: Partial<S3Options>) => S3Client, options: S3Options) => Promise<void>,
): void {
  test(`s3 on moto: ${text}`, async (t) => {
    const { options } = moto;
    if (options === undefined) return t.skip(moto.reason);
    const clients: S3Client[] = [];
    const make = (changed: Partial<S3Options> = {}): S3Client => {
      clients.push(new S3Client({ ...options, ...changed }, { clock: systemClock, random: new SeededRandom(1) }));
      return clients.at(-1)!;
    };
    try {
      await run(make, options);
    } finally {
      for (const client of clients) await client.close();
    }
    return undefined;
  });
}

function anyTime(): { signal: AbortSignal; deadlineMs: number } {
  return { signal: AbortSignal.timeout(20_000), deadlineMs: Number.POSITIVE_INFINITY };
}

motoTest("AWS's own code finds our signatures right, for every call and for keys with odd signs", async (make) => {
  const client = make();
  const bytes = noise(1_000, 1);
  for (const key of [
    "plain",
    "a folder/with spaces",
    "signs !'()*&$@=;:+,?#%",
    "ümlaut/日本",
    "double//slash",
    "~tilde.",
  ]) {
    const at = { bucket: BUCKET, key };
    assert.equal(
      await client.put(at, [bytes.subarray(0, 300), bytes.subarray(300)], { ...anyTime(), ifAbsent: false }),
      true,
      key,
    );
    const back = Buffer.alloc(500);
    await client.get(at, 250, [back], anyTime());
    assert.ok(back.equals(bytes.subarray(250, 750)), key);
    assert.equal(await client.head(at, anyTime()), 1_000, key);
    await client.remove(at, anyTime());
  }
  assert.deepEqual(await client.list(BUCKET, "a b/", "a b/c", anyTime()), []);
});

motoTest("a wrong secret is refused, and told as storage-failed without a retry", async (make) => {
  const put = make({ secretAccessKey: "wrong" }).put({ bucket: BUCKET, key: "x" }, [Buffer.from("x")], {
    ...anyTime(),
    ifAbsent: false,
  });
  await assert.rejects(put, (thrown) => {
    assertReason(thrown, "storage-failed");
    assert.match((thrown as { diagnostic?: string }).diagnostic ?? "", /status 403, SignatureDoesNotMatch/);
    return true;
  });
});

motoTest("a conditional write keeps what is there, whole and in parts", async (make) => {
  const client = make({ partBytes: 5 * 1024 * 1024 });
  for (const byteCount of [1_000, 6 * 1024 * 1024]) {
    const at = { bucket: BUCKET, key: `conditional/${byteCount}` };
    const first = noise(byteCount, 1);
    const second = noise(byteCount, 2);
    assert.equal(await client.put(at, [first], { ...anyTime(), ifAbsent: true }), true);
    assert.equal(await client.put(at, [second], { ...anyTime(), ifAbsent: true }), false);
    const back = Buffer.alloc(byteCount);
    await client.get(at, 0, [back], anyTime());
    assert.ok(back.equals(first));
    assert.equal(await client.put(at, [second], { ...anyTime(), ifAbsent: false }), true);
    await client.get(at, 0, [back], anyTime());
    assert.ok(back.equals(second));
  }
});

motoTest("of many writers of one object exactly one stores it", async (make) => {
  const client = make();
  const at = { bucket: BUCKET, key: "raced" };
  const stored = await Promise.all(
    Array.from({ length: 8 }, (_, i) => client.put(at, [noise(100, i)], { ...anyTime(), ifAbsent: true })),
  );
  assert.equal(stored.filter((isStored) => isStored).length, 1);
});

motoTest(
  "a transfer to an object that is there: kept, an error, or replaced, as its memory says",
  async (_make, options) => {
    const agent = await TransferAgent.start({ name: "initiator", tcp: false, shm: false, s3: options });
    try {
      const local = await agent.register({ kind: "host", bytes: Buffer.alloc(2_000) });
      const one = Uint32Array.of(0);
      const two = Uint32Array.of(1);
      const list = (region: { id: number; byteLength: number }): DescriptorList =>
        DescriptorList.blocks(region, { blockBytes: 1_000 });
      const outcomes: string[] = [];
      for (const onExists of ["keep", "fail", "replace"] as const) {
        const memory = {
          kind: "object",
          bucket: BUCKET,
          slotBytes: 1_000,
          slotCount: 1,
          keyOf: () => `exists/${onExists}`,
          onExists,
        } as const;
        const objects = await agent.register(memory);
        const table = agent.prepare(agent.self, { local: list(local), remote: list(objects) });
        local.bytes.fill(1);
        await agent.write(table, one, one).done;
        local.bytes.fill(2);
        const again = agent.write(table, one, one);
        await again.done.catch(() => undefined);
        await agent.read(table, two, one).done;
        outcomes.push(`${onExists} ${again.state} ${local.bytes[1_500]}`);
      }
      assert.deepEqual(outcomes, ["keep done 1", "fail failed 1", "replace done 2"]);
    } finally {
      await agent.close();
    }
  },
);
