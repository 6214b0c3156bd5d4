import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { connect } from "node:net";
import { join } from "node:path";
import { describe, test } from "node:test";
import { encodeBatch, FakeKvCache } from "./fixtures/fake-kv-cache.ts";
import { FakeVllm, type FakeVllmOptions } from "./fixtures/fake-vllm.ts";
import type { WireRecord, WireRecording } from "./fixtures/record-wire.ts";

/**
 * The fake server says, byte for byte, what a real vLLM 0.29.0 said to the same requests. What a model computes (tokens,
 * logprobs, texts) is given to it from the recording; times and random ids are made alike on both sides.
 */
const RECORDING = JSON.parse(
  readFileSync(join(import.meta.dirname, "fixtures/vllm-0.29.0.json"), "utf8"),
) as WireRecording;

function record(name: string): WireRecord {
  const found = RECORDING.records.find((one) => one.name === name);
  assert.ok(found, `${name} was recorded`);
  return found;
}

function exchange(url: string, { method, path, body }: WireRecord): Promise<string> {
  const { port, host, hostname } = new URL(url);
  return new Promise((resolve, reject) => {
    const chunks: Buffer[] = [];
    const socket = connect(Number(port), hostname, () => {
      const head = [`${method} ${path} HTTP/1.1`, `host: ${host}`, "connection: close"];
      if (body !== "") head.push("content-type: application/json", `content-length: ${Buffer.byteLength(body)}`);
      socket.write(`${head.join("\r\n")}\r\n\r\n${body}`);
    });
    socket.on("data", (chunk: Buffer) => chunks.push(chunk));
    socket.on("error", reject);
    socket.on("close", () => resolve(Buffer.concat(chunks).toString("latin1")));
  });
}

/** What differs between two runs of the same server. */
function withoutTimes(answer: string): string {
  return answer
    .replace(/^date: .*$/m, "date: DATE")
    .replaceAll(/"created":\d{10}/g, '"created":0')
    .replaceAll(/modelperm-[0-9a-f]{16}/g, "modelperm-0");
}

/** Tokens and logprobs of a recorded answer, for the fake to give. */
function modelOf(answer: string): Pick<FakeVllmOptions, "nextToken" | "logprobsOf"> {
  const tokens = [...answer.matchAll(/(?<!prompt_)"token_ids":\[([\d,]+)\]/g)].flatMap((match) => match[1]!.split(",").map(Number));
  const chat = [...answer.matchAll(/"top_logprobs":\[((?:\{"token":"token_id:[^}]*\},?)+)\]/g)].map((match) =>
    [...match[1]!.matchAll(/token_id:(\d+)","logprob":(-?[\d.]+)/g)].map((one) => [Number(one[1]), Number(one[2])] as const));
  const flat = [...answer.matchAll(/"top_logprobs":\[\{("token_id:\d+":[^}]*)\}\]/g)].map((match) =>
    [...match[1]!.matchAll(/token_id:(\d+)":(-?[\d.]+)/g)].map((one) => [Number(one[1]), Number(one[2])] as const));
  const logprobs = chat.length > 0 ? chat : flat;
  return {
    nextToken: (_, generated) => tokens[generated]!,
    ...(logprobs.length === 0 ? {} : { logprobsOf: (_token, _count, generated) => logprobs[generated]! }),
  };
} // prettier-ignore

describe("fake vLLM: byte for byte", () => {
  const cases: readonly (readonly [name: string, before: readonly string[]])[] = [
    ["health", []],
    ["version", []],
    ["models", []],
    ["load", []],
    ["generate-stream", []],
    ["generate-stream-cached", ["generate-stream"]],
    ["generate-stream-logprobs", ["generate-stream"]],
    ["generate-stream-logprobs-0", ["generate-stream"]],
    ["generate-full", []],
    ["generate-salted", ["generate-stream"]],
    ["generate-priority", []],
    ["generate-no-tokens", []],
    ["generate-unknown-model", []],
    ["generate-token-too-large", []],
    ["generate-too-long", []],
    ["generate-bad-field", []],
    ["completions-unknown-model", []],
    ["reset-prefix-cache", ["generate-stream"]],
    ["not-found", []],
  ];
  for (const [name, before] of cases) {
    test(name, async () => {
      const wanted = record(name);
      const fake = new FakeVllm(modelOf(wanted.answer));
      const url = await fake.listen();
      try {
        for (const earlier of before) await exchange(url, record(earlier));
        assert.equal(withoutTimes(await exchange(url, wanted)), withoutTimes(wanted.answer));
      } finally {
        await fake.close();
      }
    });
  }

  // Texts are the tokenizer's, which the fake has not: they are left out on both sides, and with them the lengths of chunks.
  for (const name of ["completions-stream", "completions-stream-logprobs"]) {
    test(`${name}, but for its texts`, async () => {
      const wanted = record(name);
      const fake = new FakeVllm(modelOf(wanted.answer));
      const url = await fake.listen();
      const plain = (answer: string): string =>
        withoutTimes(answer)
          .replaceAll(/"text":"[^"]*"/g, '"text":""')
          .replaceAll(/"text_offset":\[\d+\]/g, '"text_offset":[0]')
          .replaceAll(/^[0-9a-f]+\r$/gm, "LENGTH\r");
      try {
        assert.equal(plain(await exchange(url, wanted)), plain(wanted.answer));
      } finally {
        await fake.close();
      }
    });
  }

  test("metrics: every line of the real page, with this server's numbers", async () => {
    const wanted = record("metrics-after");
    const fake = new FakeVllm();
    const url = await fake.listen();
    const names = (answer: string): string[] =>
      answer.split("\n").map((line) => (line.startsWith("#") ? line : line.slice(0, line.lastIndexOf(" "))));
    const body = (answer: string): string => answer.slice(answer.indexOf("\r\n\r\n"));
    try {
      assert.deepEqual(names(body(await exchange(url, wanted))), names(body(wanted.answer)));
    } finally {
      await fake.close();
    }
  });
});

describe("fake vLLM: KV events byte for byte", () => {
  test("stored, salted, cleared", () => {
    const prompt = Array.from({ length: 70 }, (_, i) => 300 + i);
    const cache = new FakeKvCache(32, 128);
    const batches: Buffer[] = [];
    const take = (message: number): void => {
      const seconds = Buffer.from(RECORDING.events[message]![2]!, "base64").readDoubleBE(2);
      batches.push(encodeBatch(cache.events.splice(0), seconds, 0, { asMaps: true, replayTopic: true }));
    };
    cache.release(cache.admit(prompt, undefined, true)!);
    take(0);
    cache.release(cache.admit(prompt, "dynamo-cache-salt:tenant", true)!);
    take(1);
    assert.equal(cache.reset(), true);
    cache.release(cache.admit(prompt, undefined, true)!);
    take(2);
    assert.deepEqual(
      batches.map((batch) => batch.toString("base64")),
      RECORDING.events.map((frames) => frames[2]),
    );
  });
});
