import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { seal, unseal } from "./sealed-record.ts";

describe("sealed record", () => {
  it("any JSON object comes back equal", () => {
    fc.assert(
      fc.property(fc.dictionary(fc.string(), fc.jsonValue()), (fields) => {
        const plain = JSON.parse(JSON.stringify(fields)) as Record<string, unknown>;
        assert.deepEqual(unseal("entry", seal("entry", plain)), plain);
      }),
    );
  });

  it("cut anywhere, lengthened, or with any one bit flipped it reads as nothing", () => {
    const whole = seal("entry", { key: "v1/a", value: [1, 2, 3] });
    for (let length = 0; length < whole.length; length++) {
      assert.equal(unseal("entry", whole.subarray(0, length)), undefined, `cut to ${length}`);
    }
    assert.equal(unseal("entry", Buffer.concat([whole, Buffer.from(" ")])), undefined);
    assert.equal(unseal("entry", Buffer.concat([whole, whole])), undefined);
    for (let bit = 0; bit < whole.length * 8; bit++) {
      const flipped = Buffer.from(whole);
      flipped[bit >>> 3]! ^= 1 << (bit & 7);
      assert.equal(unseal("entry", flipped), undefined, `bit ${bit}`);
    }
  });

  it("another kind, another version and JSON that is no object read as nothing", () => {
    const whole = seal("entry", {}).toString();
    assert.equal(unseal("lease", Buffer.from(whole)), undefined);
    assert.equal(unseal("entry", Buffer.from(whole.replace("entry 1", "entry 2"))), undefined);
    for (const other of [[], null, 1, "text"]) assert.equal(unseal("entry", seal("entry", other)), undefined);
  });

  it("random bytes read as nothing and throw nothing", () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 200 }), (bytes) => {
        assert.equal(unseal("entry", Buffer.from(bytes)), undefined);
        assert.equal(unseal("entry", Buffer.concat([Buffer.from("dynamo-entry 1 00000000\n"), bytes])), undefined);
      }),
    );
  });
});
