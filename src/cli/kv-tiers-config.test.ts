import assert from "node:assert/strict";
import { test } from "node:test";
import { parseByteSize } from "./byte-size.ts";
import { DYNAMO_KVBM_VARIABLES } from "./dynamo-variables.ts";
import { kvTiersConfig } from "./kv-tiers-config.ts";
import { OPTIONS } from "./options.ts";
import { resolveOptions } from "./resolve-options.ts";

async function tiers(argv: readonly string[], env: NodeJS.ProcessEnv = {}): Promise<unknown> {
  const { values } = await resolveOptions({ command: "worker", argv: [...argv], env });
  return kvTiersConfig(values, env);
}

const KEYS = { AWS_ACCESS_KEY_ID: "id", AWS_SECRET_ACCESS_KEY: "secret" };

test("sizes: a unit, or GB; anything else is named", () => {
  assert.equal(parseByteSize("1", "kv-host"), 1e9);
  assert.equal(parseByteSize("0.5", "kv-host"), 5e8);
  assert.equal(parseByteSize("512MB", "kv-host"), 512e6);
  assert.equal(parseByteSize(" 2 GiB ", "kv-host"), 2 ** 31);
  for (const text of ["", "much", "-1GB", "1XB", "1e3"]) {
    assert.throws(() => parseByteSize(text, "kv-host"), /--kv-host: expected a size such as 512MB or 4GB/);
  }
});

test("KV tiers: none unless asked for; Dynamo's variables mean the same as the flags", async () => {
  assert.equal(await tiers([]), undefined);
  assert.equal(await tiers(["--kv-host=0"]), undefined);
  const flags = ["--kv-host=1GB", "--kv-disk=4GB", "--kv-disk-path=/var/kv", "--kv-disk-every-block"];
  const expected = { hostBytes: 1e9, disk: { bytes: 4e9, folder: "/var/kv", minSights: 1 } };
  assert.deepEqual(await tiers(flags), expected);
  const env = {
    DYN_KVBM_CPU_CACHE_GB: "1",
    DYN_KVBM_DISK_CACHE_GB: "4",
    DYN_KVBM_DISK_CACHE_DIR: "/var/kv",
    DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER: "true",
  };
  assert.deepEqual(await tiers([], env), expected);
  const inBlocks = { DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS: "100", DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS: "200" };
  assert.deepEqual(await tiers(["--kv-disk-path=/var/kv"], inBlocks), {
    hostBytes: 0,
    hostBlocks: 100,
    disk: { bytes: 0, blocks: 200, folder: "/var/kv", minSights: 2 },
  });
});

test("KV tiers: a variable of Dynamo that means nothing here is said to be ignored, each with its reason", async () => {
  const env = { DYN_KVBM_METRICS: "true", DYN_KVBM_LEADER_ZMQ_HOST: "h", DYN_KVBM_OBJECT_ENABLED: "" };
  const { warnings } = await resolveOptions({ command: "worker", argv: [], env });
  assert.deepEqual(
    warnings.map((line) => line.split(" ")[0]),
    ["DYN_KVBM_METRICS", "DYN_KVBM_LEADER_ZMQ_HOST"],
  );
  const { warnings: ofFrontend } = await resolveOptions({ command: "frontend", argv: [], env });
  assert.deepEqual(ofFrontend, []);
  const options = new Set(Object.values(OPTIONS).map((spec) => spec.env as string | undefined));
  for (const name of Object.keys(DYNAMO_KVBM_VARIABLES)) assert(!options.has(name), name);
});

test("KV tiers: a frequency filter per tier, by flag or variable; what the counters cannot hold is refused", async () => {
  const flags = ["--kv-host=1GB", "--kv-disk=4GB", "--kv-disk-path=/var/kv", "--kv-s3=file:///mnt/kv"];
  const expected = {
    hostBytes: 1e9,
    hostMinFrequency: 2,
    disk: { bytes: 4e9, folder: "/var/kv", minSights: 2, minFrequency: 3 },
    object: { store: { kind: "folder", folder: "/mnt/kv" }, minFrequency: 4 },
  };
  const asked = ["--kv-host-min-frequency=2", "--kv-disk-min-frequency=3", "--kv-s3-min-frequency=4"];
  assert.deepEqual(await tiers([...flags, ...asked]), expected);
  const env = {
    DYN_KVBM_HOST_OFFLOAD_MIN_FREQUENCY: "2",
    DYN_KVBM_DISK_OFFLOAD_MIN_FREQUENCY: "3",
    DYN_KVBM_OBJECT_OFFLOAD_MIN_FREQUENCY: "4",
  };
  assert.deepEqual(await tiers(flags, env), expected);
  await assert.rejects(tiers([...flags, "--kv-disk-min-frequency=16"]), /kv-disk-min-frequency/);
});

test("KV tiers: a store is a bucket of AWS, a bucket elsewhere or a folder", async () => {
  const s3 = { accessKeyId: "id", secretAccessKey: "secret", sessionToken: undefined };
  const at = (endpoint: string, region = "us-east-1"): unknown => ({
    hostBytes: 0,
    object: { store: { kind: "s3", bucket: "kv", s3: { ...s3, endpoint, region } } },
  });
  assert.deepEqual(await tiers(["--kv-s3=http://127.0.0.1:9000/kv"], KEYS), at("http://127.0.0.1:9000"));
  assert.deepEqual(
    await tiers(["--kv-s3=s3://kv", "--kv-s3-region=eu-west-1"], KEYS),
    at("https://s3.eu-west-1.amazonaws.com", "eu-west-1"),
  );
  const env = {
    DYN_KVBM_OBJECT_BUCKET: "kv",
    DYN_KVBM_OBJECT_ENDPOINT: "http://minio:9000",
    DYN_KVBM_OBJECT_ACCESS_KEY: "id",
    DYN_KVBM_OBJECT_SECRET_KEY: "secret",
  };
  assert.deepEqual(await tiers([], env), at("http://minio:9000"));
  const folder = { hostBytes: 0, object: { store: { kind: "folder", folder: "/mnt/kv" } } };
  assert.deepEqual(await tiers(["--kv-s3=file:///mnt/kv"]), folder);
  assert.deepEqual(await tiers([], { DYN_KVBM_REMOTE_DISK_PATH: "/mnt/kv" }), folder);
});

test("KV tiers: what is no store, and a bucket without keys, is refused by name", async () => {
  for (const address of ["kv", "ftp://host/kv", "http://host/", "s3://"]) {
    await assert.rejects(tiers([`--kv-s3=${address}`], KEYS), /--kv-s3: expected s3:\/\/bucket/);
  }
  await assert.rejects(tiers(["--kv-s3=s3://kv"]), /--kv-s3: expected AWS_ACCESS_KEY_ID/);
});
