import assert from "node:assert/strict";
import { describe, it } from "node:test";
import fc from "fast-check";
import { DynamoError } from "../../errors/index.ts";
import { formatDynAddress, formatEndpoint, parseDynAddress } from "./endpoint-address.ts";

const isConfigError = (error: unknown): boolean => error instanceof DynamoError && error.reason === "invalid-config";

describe("endpoint address", () => {
  it("is written namespace.component.endpoint, with or without the scheme", () => {
    const address = { namespace: "dynamo", component: "backend", endpoint: "generate" };
    assert.equal(formatEndpoint(address), "dynamo.backend.generate");
    assert.equal(formatDynAddress(address), "dyn://dynamo.backend.generate");
    assert.deepEqual(parseDynAddress("dyn://dynamo.backend.generate"), address);
    assert.deepEqual(parseDynAddress("dynamo.backend.generate"), address);
  });

  it("any valid names come back as they were", () => {
    const name = fc.stringMatching(/^[A-Za-z0-9_-]{1,63}$/);
    fc.assert(
      fc.property(name, name, name, (namespace, component, endpoint) => {
        const address = { namespace, component, endpoint };
        assert.deepEqual(parseDynAddress(formatDynAddress(address)), address);
      }),
    );
  });

  it("a wrong number of parts or a wrong name is refused, naming what was expected", () => {
    const wrong = [
      "",
      "dyn://",
      "a.b",
      "a.b.c.d",
      "a..c",
      "a.b.c ",
      "a/b/c",
      "http://a.b.c",
      "a.b.é",
      `${"a".repeat(64)}.b.c`,
    ];
    for (const text of wrong) assert.throws(() => parseDynAddress(text), isConfigError, text);
    assert.throws(
      () => formatEndpoint({ namespace: "a", component: "b.c", endpoint: "d" }),
      /component: expected 1 to 63 letters, digits, - or _, got "b.c"/,
    );
  });
});
