import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { exchange, type WireRecord } from "../foreign/fixtures/raw-http.ts";
import { FakeLlamaServer, type FakeLlamaServerOptions } from "./fixtures/fake-llama-server.ts";
import type { WireRecording } from "./fixtures/record-wire.ts";

/**
 * The fake server says, byte for byte, what a real llama.cpp server (b11549) said to the same requests. What a model computes
 * (tokens, pieces of text, logprobs) is given to it from the recording; times, random ids and the echo of the sampling
 * settings are made alike on both sides.
 */
const RECORDING = JSON.parse(
  readFileSync(join(import.meta.dirname, "fixtures/llama-server-b11549.json"), "utf8"),
) as WireRecording;

function record(name: string): WireRecord {
  const found = RECORDING.records.find((one) => one.name === name);
  assert.ok(found, `${name} was recorded`);
  return found;
}

/** What differs between two runs of the same server; lengths of chunks and bodies follow from it. */
function alike(answer: string): string {
  return answer
    .replaceAll(/"timings":\{"cache_n":(\d+),"prompt_n":(\d+),[^}]*"predicted_n":(\d+),[^}]*\}/g, '"timings":[$1,$2,$3]')
    .replaceAll(/"generation_settings":\{.*?"lora":\[\]\}/g, '"generation_settings":0')
    .replaceAll(/"created":\d{10}/g, '"created":0')
    .replaceAll(/chatcmpl-\w{32}/g, "chatcmpl-0")
    .replaceAll(/<__media_\w+__>/g, "<__media__>")
    .replace(/^Process-Start-Time-Unix: \d+/m, "Process-Start-Time-Unix: 0")
    .replaceAll(/^[0-9a-f]+\r$/gm, (line) => (line === "0\r" ? line : "N\r"))
    .replace(/^Content-Length: \d+/m, "Content-Length: N");
} // prettier-ignore

/** Pieces of the tokens in the recording's prompts and answers. */
const PIECES = new Map<number, Buffer>(
  ([[504, "The"], [3575, " capital"], [282, " of"], [4649, " France"], [314, " is"], [7042, " Paris"], [30, "."], [198, "\n"],
    [260, " the"], [28, ","], [378, " The"], [1, "<|im_start|>"], [2, "<|im_end|>"], [4093, "user"], [15922, "Who"], [520, "assistant"]] as const)
    .map(([id, text]) => [id, Buffer.from(text)] as const),
); // prettier-ignore
for (const [id, bytes] of [[10813, [0xf0, 0x9f]], [232, [0x8e]], [227, [0x89]]] as const) {
  PIECES.set(id, Buffer.from(bytes));
} // prettier-ignore

function tokensOf(answer: string): number[] {
  return [...answer.matchAll(/"tokens":\[([\d,]+)\]/g)].flatMap((match) => match[1]!.split(",").map(Number));
}

function modelOf(answer: string, given?: readonly number[]): FakeLlamaServerOptions {
  const tokens = given ?? tokensOf(answer);
  const logprobs = [...answer.matchAll(/"top_logprobs":\[(.*?)\]\}\]/g)].map((match) =>
    [...match[1]!.matchAll(/"id":(\d+),.*?"logprob":(-?[\d.]+)/g)].map((one) => [Number(one[1]), Number(one[2])] as const));
  return {
    tokenize: (text) => (text === "Hello, world!" ? [19_556, 28, 905, 17] : [504, 3575, 282, 4649, 314]),
    pieceOf: (token) => PIECES.get(token) ?? Buffer.from("?"),
    nextToken: (_, generated) => tokens[generated]!,
    ...(logprobs.length === 0 ? {} : { logprobsOf: (_token, _count, generated) => logprobs[generated]! }),
  };
} // prettier-ignore

describe("fake llama.cpp server: byte for byte", () => {
  const poppers = [10813, 232, 227, 10813, 232, 227];
  const paris = [7042, 30, 198];
  const cases: readonly (readonly [name: string, before: readonly string[], tokens?: readonly number[]])[] = [
    ["health", []],
    ["props", []],
    ["models", []],
    ["metrics-idle", []],
    ["slots-idle", []],
    ["lora-adapters", []],
    ["tokenize", []],
    ["stream", []],
    ["stream-cached", ["stream"], paris],
    ["stream-logprobs", ["stream"], paris],
    ["whole", ["stream"]],
    ["strange-token", []],
    ["too-long", []],
    ["no-tokens", []],
    ["bad-field", []],
    ["erase-refused", []],
    ["openai-stream-ids", ["stream"], paris],
    ["openai-stream-text", ["stream"], paris],
    ["openai-whole", ["stream"], paris],
    ["openai-too-long", []],
    ["not-found", []],
  ];
  const check = async (name: string, before: readonly string[], model: FakeLlamaServerOptions): Promise<void> => {
    const wanted = record(name);
    const fake = new FakeLlamaServer(model);
    const url = await fake.listen();
    try {
      for (const earlier of before) await exchange(url, record(earlier));
      assert.equal(alike(await exchange(url, wanted)), alike(wanted.answer));
    } finally {
      await fake.close();
    }
  };
  for (const [name, before, tokens] of cases) {
    test(name, () => check(name, before, modelOf(record(name).answer, tokens)));
  }

  test("stream-characters-in-pieces: an event for each character, with the id of its last token", () =>
    // The real one had another sequence in its last slot.
    check("stream-characters-in-pieces", ["stream"], modelOf("", poppers)));
});
