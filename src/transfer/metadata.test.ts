import assert from "node:assert/strict";
import { test } from "node:test";
import fc from "fast-check";
import { DynamoError } from "../errors/index.ts";
import { REMOTE_ACCESS, type BackendName } from "./base.ts";
import { MAX_METADATA_BYTES } from "./limits.ts";
import { decodeMetadata, encodeMetadata } from "./metadata.ts";
import { RegionTable } from "./region.ts";
import { assertReason } from "./transfer.battery.ts";

const IDENTITY = { name: "dynamo.decode.7", incarnation: 0xdead_beef_0102_0304n, hostId: "host" };

test("transfer metadata: what is shared comes back, what is not is not told", () => {
  const someRegions = fc.array(
    fc.record({
      bytes: fc.integer({ min: 1, max: 100 }),
      label: fc.string({ maxLength: 20 }),
      access: fc.constantFrom(...REMOTE_ACCESS),
    }),
    { maxLength: 10 },
  );
  fc.assert(
    fc.property(someRegions, fc.uint8Array({ maxLength: 50 }), (specs, part) => {
      const table = new RegionTable();
      const regions = specs.map(({ bytes, label, access }) =>
        table.add({ kind: "host", bytes: Buffer.alloc(bytes) }, { label, remoteAccess: access }),
      );
      const decoded = decodeMetadata(
        encodeMetadata(IDENTITY, new Map<BackendName, Uint8Array>([["tcp", part]]), regions),
      );
      assert.equal(decoded.name, IDENTITY.name);
      assert.equal(decoded.incarnation, IDENTITY.incarnation);
      assert.deepEqual(decoded.backends.get("tcp"), Buffer.from(part));
      const shown = regions.filter(({ remoteAccess }) => remoteAccess !== "none");
      assert.deepEqual(
        [...decoded.regions.values()],
        shown.map(({ id, kind, byteLength, remoteAccess, label }) => ({ id, kind, byteLength, remoteAccess, label })),
      );
    }),
  );
});

test("transfer metadata: truncated, mangled or endless bytes are refused with a reason", () => {
  const table = new RegionTable();
  const regions = [1, 2, 3].map((bytes) => table.add({ kind: "host", bytes: Buffer.alloc(bytes) }, { label: "pool" }));
  const whole = encodeMetadata(IDENTITY, new Map([["tcp", Buffer.alloc(9)]]), regions);
  for (let end = 0; end < whole.length; end++) {
    assert.throws(
      () => decodeMetadata(whole.subarray(0, end)),
      (thrown) => assertReason(thrown, "malformed-frame"),
    );
  }
  assert.throws(
    () => decodeMetadata(Buffer.concat([whole, Buffer.alloc(1)])),
    (thrown) => assertReason(thrown, "malformed-frame"),
  );
  assert.throws(
    () => decodeMetadata(Buffer.alloc(MAX_METADATA_BYTES + 1)),
    (thrown) => assertReason(thrown, "malformed-frame"),
  );
  const later = Buffer.from(whole);
  later.writeUInt16LE(2, 4);
  assert.throws(
    () => decodeMetadata(later),
    (thrown) => assertReason(thrown, "protocol-version"),
  );
  fc.assert(
    fc.property(fc.nat(whole.length - 1), fc.nat(255), (at, byte) => {
      const mangled = Buffer.from(whole);
      mangled[at] = byte;
      try {
        decodeMetadata(mangled);
      } catch (thrown) {
        assert.ok(thrown instanceof DynamoError, String(thrown));
      }
    }),
  );
});

test("transfer regions: an id of the past is stale, a guess is out of bounds, a slot is used again under a new id", () => {
  const table = new RegionTable();
  const first = table.add({ kind: "host", bytes: Buffer.alloc(10) }, {});
  table.remove(first);
  const second = table.add({ kind: "host", bytes: Buffer.alloc(10) }, {});
  assert.notEqual(first.id, second.id);
  assert.equal(first.id & 0xffff, second.id & 0xffff);
  assert.throws(
    () => table.check(first.id, 0, 1, "read"),
    (thrown) => assertReason(thrown, "transfer-stale"),
  );
  assert.throws(
    () => table.check((7 << 16) | 0, 0, 1, "read"),
    (thrown) => assertReason(thrown, "transfer-out-of-bounds"),
  );
  assert.throws(
    () => table.check(12, 0, 1, "read"),
    (thrown) => assertReason(thrown, "transfer-out-of-bounds"),
  );
  assert.equal(table.check(second.id, 9, 1, "read"), second);
});
