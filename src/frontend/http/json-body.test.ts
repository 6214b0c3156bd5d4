import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { DynamoError } from "../../errors/index.ts";
import { MAX_JSON_DEPTH, findJsonError, findTooDeep, parseJsonBody } from "./json-body.ts";

function refusal(text: string | Buffer): DynamoError {
  try {
    parseJsonBody(Buffer.from(text as string));
  } catch (thrown) {
    assert.ok(thrown instanceof DynamoError);
    return thrown;
  }
  assert.fail("the body was accepted");
}

test("json body: what JSON.stringify writes is read back, whatever the values", () => {
  fc.assert(
    fc.property(fc.jsonValue({ maxDepth: 6 }), (value) => {
      const text = JSON.stringify(value);
      assert.deepEqual(parseJsonBody(Buffer.from(text)), JSON.parse(text));
      assert.equal(findJsonError(text), -1);
    }),
  );
});

test("json body: the position of a mistake is V8's where V8 gives one, and found exactly when V8 refuses", () => {
  const text = fc.jsonValue({ maxDepth: 4 }).map((value) => JSON.stringify(value));
  const edit = fc.tuple(fc.nat(), fc.constantFrom("", "x", '"', "{", "]", ",", ":", "\\", "-", "1", "\n", "u", "."));
  fc.assert(
    fc.property(text, edit, fc.boolean(), (valid, [at, inserted], remove) => {
      const index = at % (valid.length + 1);
      const edited = valid.slice(0, index) + inserted + valid.slice(remove ? index + 1 : index);
      let message: string | undefined;
      try {
        JSON.parse(edited);
      } catch (thrown) {
        message = (thrown as Error).message;
      }
      const found = findJsonError(edited);
      assert.equal(found === -1, message === undefined, `${JSON.stringify(edited)}: ${message}, found ${found}`);
      const position = /at position (\d+)/.exec(message ?? "")?.[1];
      if (position !== undefined) assert.equal(found, Number(position), `${JSON.stringify(edited)}: ${message}`);
    }),
    { numRuns: 2_000 },
  );
});

test("json body: the message names the position and one character, never the text", () => {
  const error = refusal('{"model": "m",\n "messages": secret}');
  assert.equal(error.reason, "malformed-json");
  assert.equal(
    error.publicMessage,
    'the request body is not valid JSON: unexpected "s" at position 28 (line 2, column 14)',
  );
  assert.match(refusal('{"a": 1').publicMessage, /unexpected end at position 7$/);
  assert.match(refusal("").publicMessage, /empty/);
});

test("json body: bytes that are not UTF-8 are refused, not repaired", () => {
  for (const bytes of [[0xff], [0xc0, 0x80], [0xed, 0xa0, 0x80], [0xe2, 0x82]]) {
    const body = Buffer.concat([Buffer.from('"'), Buffer.from(bytes), Buffer.from('"')]);
    assert.throws(() => parseJsonBody(body), /not valid UTF-8/);
  }
  assert.equal(parseJsonBody(Buffer.from('"é 你 😀"')), "é 你 😀");
});

test("json body: nesting is bounded, brackets inside strings do not count", () => {
  const nested = (depth: number): string => "[".repeat(depth) + "]".repeat(depth);
  assert.doesNotThrow(() => parseJsonBody(Buffer.from(nested(MAX_JSON_DEPTH))));
  assert.match(refusal(nested(MAX_JSON_DEPTH + 1)).publicMessage, /nested too deeply/);
  assert.match(refusal("[".repeat(1_000_000)).publicMessage, /nested too deeply/);
  const texts = [nested(100), `\\${nested(100)}`, `"${nested(100)}`, "[".repeat(31), `${"x".repeat(40)}"${nested(90)}`];
  for (const text of [...texts, `${"x".repeat(29)}\\\\"`, `${"y".repeat(31)}\\"[${"\\".repeat(7)}`]) {
    assert.equal(parseJsonBody(Buffer.from(JSON.stringify(text))), text);
  }
});

test("json body: the depth scan agrees with a walk over the parsed value", () => {
  const depthOf = (value: unknown): number =>
    typeof value === "object" && value !== null ? 1 + Math.max(0, ...Object.values(value).map(depthOf)) : 0;
  const strings = fc.string({ unit: fc.constantFrom("[", "]", "{", '"', "\\", "a", "é"), maxLength: 80 });
  const { tree } = fc.letrec((tie) => ({
    tree: fc.oneof(
      { depthSize: "large" },
      strings,
      fc.array(tie("tree"), { maxLength: 3 }),
      fc.dictionary(strings, tie("tree"), { maxKeys: 2 }),
    ),
  }));
  fc.assert(
    fc.property(tree, fc.nat({ max: 6 }), (value, limit) => {
      assert.equal(findTooDeep(Buffer.from(JSON.stringify(value)), limit) >= 0, depthOf(value) > limit);
    }),
    { numRuns: 500 },
  );
});

test("json body: a key named __proto__ stays an own key and changes nothing else", () => {
  const body = parseJsonBody(Buffer.from('{"__proto__": {"polluted": true}, "constructor": 1}')) as object;
  assert.deepEqual(Object.keys(body), ["__proto__", "constructor"]);
  assert.equal(({} as Record<string, unknown>).polluted, undefined);
});
