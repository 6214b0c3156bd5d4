import assert from "node:assert/strict";
import { describe, test } from "node:test";
import fc from "fast-check";
import { engineTokenizer } from "../../cli/text-engine-config.ts";
import { Detokenizer } from "../../frontend/postprocess/index.ts";
import { loadTokenizer, type Tokenizer } from "../../frontend/preprocess/index.ts";
import { artifactFromPath, byteArtifact, vocabularySizeOf, type TokenizerArtifact } from "../../model/index.ts";
import { REAL_LLAMA_MODEL } from "../../../test/helpers/real-llama-server.ts";
import { errorMessageOf, retryAfterMsOf } from "./error-body.ts";
import { TextTokens, TokenBytes } from "./text-tokens.ts";

/** Text that a tokenizer may stumble over: its own special tokens spelled out, halves of characters, what UTF-8 is not made for. */
const TEXT = fc
  .array(
    fc.oneof(
      fc.string({ unit: "grapheme" }),
      fc.string({ unit: "binary" }),
      fc.constantFrom("<|im_end|>", "<|im_start|>user\n", "<|endoftext|>", " ", "  \n\n", "\u0000", "\ufeff", "🎉", "👩‍👩‍👧‍👦", "\ud83c", "\udf89", "né", "\r\n", "你好"), // prettier-ignore
    ),
    { maxLength: 12 },
  )
  .map((parts) => parts.join(""));

function cut(text: string, at: readonly number[]): string[] {
  const points = [0, ...at.map((one) => one % (text.length + 1)).toSorted((a, b) => a - b), text.length];
  return points.slice(1).map((end, i) => text.slice(points[i], end));
}

function check(tokenizer: Tokenizer, vocabularySize: number, runs: number): void {
  const vocabulary = new TokenBytes(engineTokenizer(tokenizer, vocabularySize));
  // SmolLM2's vocabulary lacks some bytes (0xf1 for one): no text with them comes from it either.
  const missing = Array.from({ length: 256 }, (_, byte) => byte).filter((byte) => vocabulary.split(Buffer.of(byte), 1) === undefined); // prettier-ignore
  fc.assert(
    fc.property(TEXT, fc.array(fc.nat(), { maxLength: 8 }), (text, at) => {
      const bytes = Buffer.from(text.toWellFormed(), "utf8");
      fc.pre(!missing.some((byte) => bytes.includes(byte)));
      const tokens = new TextTokens(vocabulary);
      const detokenizer = new Detokenizer(tokenizer, { skipSpecialTokens: true });
      const said = (ids: readonly number[]): string => detokenizer.push(Uint32Array.from(ids), ids.length);
      let back = "";
      for (const piece of cut(text, at)) back += said(tokens.push(piece));
      back += said(tokens.flush()) + detokenizer.flush();
      assert.equal(back, text.toWellFormed());
    }),
    { numRuns: runs },
  );
}

describe("text into tokens: the frontend makes exactly that text of them again, however it is cut", () => {
  const of = async (artifact: TokenizerArtifact, runs: number): Promise<void> =>
    check(await loadTokenizer(artifact), vocabularySizeOf(artifact), runs);
  test("bytes", () => of(byteArtifact(), 500));
  const skip = REAL_LLAMA_MODEL === undefined ? "SmolLM2 is not pulled" : false;
  test("SmolLM2's tokenizer", { skip }, () => of(artifactFromPath(REAL_LLAMA_MODEL!), 500));

  test("pieces that are the engine's tokens become those tokens", { skip }, async () => {
    const artifact = artifactFromPath(REAL_LLAMA_MODEL!);
    const tokenizer = await loadTokenizer(artifact);
    const vocabulary = new TokenBytes(engineTokenizer(tokenizer, vocabularySizeOf(artifact)));
    const ids = tokenizer.encode("The capital of France is Paris, of course.", { addSpecialTokens: false });
    const text = new TextTokens(vocabulary);
    const back = [...ids].flatMap((id) => text.push(Buffer.from(tokenizer.tokenBytes(id)).toString("utf8")));
    assert.deepEqual(back, [...ids]);
  });

  test("a tokenizer without a token for a byte says so", () => {
    const letters = { vocabularySize: 26, stripsLeadingSpace: false, encode: () => new Uint32Array(0), tokenBytes: (id: number) => Buffer.of(97 + id), isSpecial: () => false }; // prettier-ignore
    const text = new TextTokens(new TokenBytes(letters));
    assert.deepEqual(text.push("cab"), [2, 0, 1]);
    assert.throws(() => text.push("1"), /no token for byte 0x31: give the engine's own tokenizer as --model/);
  });
});

test("messages of errors, in every shape that servers have", () => {
  for (const [body, message] of [
    ['{"error":{"message":"too long","code":400}}', "too long"],
    ['{"error":"overloaded"}', "overloaded"],
    ['{"message":"no","object":"error"}', "no"],
    ['{"detail":"Not Found"}', "Not Found"],
    ['{"detail":[{"loc":["body"],"msg":"str type expected"}]}', "str type expected"],
    ['{"errors":[{"title":"bad"}]}', "bad"],
    ['{"error":{"code":5}}', '{"error":{"code":5}}'],
    ["<html><style>p{}</style><h1>502</h1> <p>Bad\nGateway</p></html>", "502 Bad Gateway"],
    ["upstream connect error", "upstream connect error"],
    ["", ""],
  ] as const) {
    assert.equal(errorMessageOf(body), message);
  }
});

test("Retry-After: seconds, a date, milliseconds, nonsense", () => {
  const now = Date.parse("2026-11-26T10:00:00Z");
  for (const [headers, wanted] of [
    [{ "retry-after": "3" }, 3_000],
    [{ "retry-after": "0.5" }, 500],
    [{ "retry-after": "Thu, 26 Nov 2026 10:00:20 GMT" }, 20_000],
    [{ "retry-after": "Thu, 26 Nov 2026 09:00:00 GMT" }, 0],
    [{ "retry-after-ms": "1500", "retry-after": "2" }, 1_500],
    [{ "retry-after": "999999" }, 3_600_000],
    [{ "retry-after": "-1" }, undefined],
    [{ "retry-after": "soon" }, undefined],
    [{}, undefined],
  ] as const) {
    assert.equal(retryAfterMsOf(headers, now), wanted);
  }
});
