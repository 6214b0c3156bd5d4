import { Writable } from "node:stream";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { loadTokenizer } from "../../../src/frontend/preprocess/tokenizer.ts";
import {
  artifactFromPath,
  byteArtifact,
  decodeArtifact,
  encodeArtifact,
  type TokenizerArtifact,
} from "../../../src/model/index.ts";
import { ggufBytes, numbers, string, texts } from "../../../src/model/gguf-fixture.ts";
import { ZipError, extractZipMember, findZipMember } from "../../../src/model/zip.ts";
import { zipBytes } from "../../../src/model/zip-fixture.ts";
import { parseProfile } from "../../../src/perf-model/profile.ts";
import { parseTrace } from "../../../src/replay/read-trace.ts";
import type { AnyTarget } from "../fuzzer.ts";
import { allowing, allowingLater } from "../allowed.ts";
import { bytesTarget } from "../mutate-bytes.ts";
import { jsonTarget } from "../mutate-json.ts";

/** Files that a user downloads or is given: model files, archives, tokenizers, traces, profiles. */
const INVALID = ["model-file-invalid"] as const;
/** What a tokenizer does to a text may be refused too. */
const TEXT = "Hello <|im_start|> wörld 12345 \u{1f600} \ud800 def f(x):\n\treturn x";

function folder(): { readonly path: string; readonly close: () => void } {
  const path = mkdtempSync(join(tmpdir(), "dynamo-fuzz-"));
  return { path, close: () => rmSync(path, { recursive: true, force: true }) };
}

async function useTokenizer(artifact: TokenizerArtifact): Promise<void> {
  const tokenizer = await allowingLater(INVALID, () => loadTokenizer(artifact));
  if (tokenizer === undefined) return;
  const ids = allowing([...INVALID, "invalid-field"], () => tokenizer.encode(TEXT, { addSpecialTokens: true }));
  for (const id of ids ?? []) tokenizer.tokenBytes(id);
  for (const id of [0, 1, -1, 2 ** 31, Number.NaN]) tokenizer.tokenBytes(id);
}

function gguf(): AnyTarget {
  const { path, close } = folder();
  const file = join(path, "model.gguf");
  const vocabulary = ["<unk>", "<s>", "</s>", ..."a b c d e f g h".split(" "), " ", "ab", "cd"];
  const model = (kind: string): Buffer =>
    ggufBytes({
      metadata: [
        ["general.architecture", string("llama")],
        ["general.alignment", { type: "u32", value: 32 }],
        ["llama.context_length", { type: "u32", value: 512 }],
        ["tokenizer.ggml.model", string(kind)],
        ["tokenizer.ggml.pre", string("smollm")],
        ["tokenizer.ggml.tokens", texts(vocabulary)],
        [
          "tokenizer.ggml.scores",
          numbers(
            "f32",
            vocabulary.map((_, i) => -i),
          ),
        ],
        [
          "tokenizer.ggml.token_type",
          numbers(
            "i32",
            vocabulary.map((_, i) => (i < 3 ? 3 : 1)),
          ),
        ],
        ["tokenizer.ggml.merges", texts(["a b", "c d"])],
        ["tokenizer.ggml.bos_token_id", { type: "u32", value: 1 }],
        ["tokenizer.ggml.eos_token_id", { type: "u32", value: 2 }],
        ["tokenizer.chat_template", string("{{ messages[0].content }}")],
      ],
      tensors: [{ name: "w", shape: [4, 8], type: 0, offset: 0 }],
      dataBytes: 128,
    });
  return bytesTarget({
    name: "gguf",
    about: "artifactFromPath on a GGUF file, and its tokenizer at work",
    corpus: [model("gpt2"), model("llama")],
    close,
    async run(bytes) {
      writeFileSync(file, bytes);
      const artifact = allowing(INVALID, () => artifactFromPath(file));
      if (artifact !== undefined) await useTokenizer(artifact);
    },
  });
}

function zip(): AnyTarget {
  const { path, close } = folder();
  const file = join(path, "archive.zip");
  const content = Buffer.from("model bytes ".repeat(50));
  return bytesTarget({
    name: "zip",
    about: "findZipMember and extractZipMember",
    corpus: [
      zipBytes([
        { name: "other.txt", content: Buffer.from("x") },
        { name: "model.gguf", content },
      ]),
      zipBytes([{ name: "model.gguf", content, method: 0 }], "a comment"),
    ],
    close,
    async run(bytes) {
      writeFileSync(file, bytes);
      let size = 0;
      const sink = new Writable({
        write(chunk: Buffer, _encoding, done) {
          size += chunk.length;
          done();
        },
      });
      try {
        const member = await findZipMember(file, "model.gguf");
        await extractZipMember(file, member, sink, AbortSignal.timeout(1_500));
        if (size !== member.bytes) throw new Error(`${size} bytes came of ${member.bytes}`);
      } catch (thrown) {
        if (!(thrown instanceof ZipError)) throw thrown;
      }
    },
  });
}

function tokenizer(): AnyTarget {
  const bytes = JSON.parse(encodeArtifact(byteArtifact()).toString("utf8")) as Record<string, unknown>;
  const small = {
    ...bytes,
    tokenizerJson: {
      version: "1.0",
      added_tokens: [{ id: 5, content: "<|im_end|>", single_word: false, lstrip: false, rstrip: true, normalized: false, special: true }], // prettier-ignore
      normalizer: { type: "Sequence", normalizers: [{ type: "NFC" }, { type: "Replace", pattern: { String: " " }, content: "_" }] }, // prettier-ignore
      pre_tokenizer: { type: "Sequence", pretokenizers: [{ type: "Split", pattern: { Regex: "\\s+" }, behavior: "Isolated", invert: false }, { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true }] }, // prettier-ignore
      post_processor: null,
      decoder: { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true },
      model: { type: "BPE", vocab: { a: 0, b: 1, ab: 2, Ġ: 3, c: 4 }, merges: [["a", "b"]] },
    },
    eosTokenIds: [5],
  };
  return jsonTarget({
    name: "tokenizer",
    about: "decodeArtifact on tokenizer JSON, loadTokenizer, encode",
    corpus: [small, { ...small, chatTemplate: "{{ bos_token }}" }],
    async run(text) {
      const artifact = allowing([...INVALID, "malformed-frame"], () => decodeArtifact(Buffer.from(text)));
      if (artifact !== undefined) await useTokenizer(artifact);
    },
  });
}

/** A folder as the hub lays it out; the fuzzed document holds its files. */
function modelFolder(): AnyTarget {
  const { path, close } = folder();
  const json = JSON.parse(encodeArtifact(byteArtifact()).toString("utf8")) as { tokenizerJson: unknown };
  return jsonTarget({
    name: "model-folder",
    about: "artifactFromPath on a folder with tokenizer.json and its configurations",
    corpus: [
      {
        "tokenizer.json": { ...(json.tokenizerJson as object), model: { type: "BPE", vocab: { a: 0, b: 1 }, merges: ["a b"] } }, // prettier-ignore
        "tokenizer_config.json": { bos_token: { content: "a" }, eos_token: "b", chat_template: [{ name: "default", template: "x" }] }, // prettier-ignore
        "generation_config.json": { eos_token_id: [1, 0] },
      },
    ],
    close,
    run(text) {
      let files: unknown;
      try {
        files = JSON.parse(text);
      } catch {
        return;
      }
      for (const name of ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]) {
        const part = (files as Record<string, unknown> | null)?.[name];
        rmSync(join(path, name), { force: true });
        if (part !== undefined) writeFileSync(join(path, name), JSON.stringify(part));
      }
      allowing(INVALID, () => artifactFromPath(path));
    },
  });
}

function traces(): AnyTarget {
  return bytesTarget({
    name: "traces",
    about: "parseTrace (Mooncake rows, Azure CSV) and parseProfile",
    corpus: [
      Buffer.from('{"timestamp": 0, "input_length": 655, "output_length": 52, "hash_ids": [1, 2]}\n'.repeat(3)),
      Buffer.from("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n"),
      Buffer.from('{"prefill":{"isl":[100,200],"ttft_ms":[1,2]},"decode":{"kv_usage":[0,1],"context_length":[1,2],"itl_ms":[[1,2],[3,4]]}}'), // prettier-ignore
    ],
    run(bytes) {
      const text = bytes.toString("utf8");
      allowing(["invalid-config"], () => parseTrace(text));
      allowing(["invalid-config"], () => parseProfile(text));
    },
  });
}

export const FILE_TARGETS: Record<string, () => AnyTarget> = {
  gguf,
  zip,
  tokenizer,
  "model-folder": modelFolder,
  traces,
};
