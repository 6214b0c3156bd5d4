import assert from "node:assert/strict";
import { createWriteStream, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";
import fc from "fast-check";
import { zipBytes, type FixtureMember } from "./zip-fixture.ts";
import { ZipError, extractZipMember, findZipMember, parseDirectory } from "./zip.ts";

let folder = "";
before(() => (folder = mkdtempSync(join(tmpdir(), "zip-test-"))));
after(() => rmSync(folder, { recursive: true, force: true }));

const never = new AbortController().signal;

async function take(zip: Uint8Array, name: string): Promise<Buffer> {
  const path = join(folder, "file.zip");
  const target = join(folder, "member");
  writeFileSync(path, zip);
  await extractZipMember(path, await findZipMember(path, name), createWriteStream(target), never);
  return readFileSync(target);
}

const text = Buffer.from("weights ".repeat(5_000));

test("zip: a member comes out as it went in, stored, deflated, empty, and with a comment behind", async () => {
  const members: FixtureMember[] = [
    { name: "a/first.txt", content: Buffer.from("first") },
    { name: "a/stored.bin", content: text, method: 0 },
    { name: "a/deflated.bin", content: text },
    { name: "empty", content: Buffer.alloc(0), method: 0 },
  ];
  for (const comment of ["", "a comment", "PK\u0005\u0006 looks like an end record but is none, and long enough"]) {
    const zip = zipBytes(members, comment);
    for (const { name, content } of members) assert.deepEqual(await take(zip, name), content, name);
  }
});

test("zip: a file cut short anywhere is refused with our error", async () => {
  const zip = zipBytes([{ name: "m", content: Buffer.from("some content") }]);
  for (let length = 0; length < zip.length; length++)
    await assert.rejects(take(zip.subarray(0, length), "m"), ZipError);
});

test("zip: damaged bytes give the right content or our error, nothing else", async () => {
  const content = Buffer.from("content that matters");
  const zip = zipBytes([
    { name: "m", content },
    { name: "n", content },
  ]);
  await fc.assert(
    fc.asyncProperty(fc.nat(zip.length - 1), fc.nat(255), async (at, byte) => {
      const damaged = Buffer.from(zip);
      damaged[at] = byte;
      try {
        assert.deepEqual(await take(damaged, "m"), content);
      } catch (error) {
        assert.ok(error instanceof ZipError, String(error));
      }
    }),
    { numRuns: 200 },
  );
});

test("zip: a member that unpacks to more than it declares is stopped at the declared size", async () => {
  const bomb = zipBytes([{ name: "m", content: Buffer.alloc(50_000_000), declaredBytes: 1_000 }]);
  await assert.rejects(take(bomb, "m"), /longer than the 1000 bytes it declares/);
});

test("zip: a wrong checksum, a wrong length and a missing member are named", async () => {
  await assert.rejects(take(zipBytes([{ name: "m", content: text, crc: 1 }]), "m"), /CRC-32/);
  await assert.rejects(
    take(zipBytes([{ name: "m", content: text, declaredBytes: text.length + 1 }]), "m"),
    /declared were/,
  );
  await assert.rejects(take(zipBytes([{ name: "m", content: text }]), "other"), /no member "other"/);
});

test("zip: encrypted members and other methods are not offered", async () => {
  const zip = zipBytes([
    { name: "locked", content: text, flags: 1 },
    { name: "bzip2", content: text, method: 12 },
    { name: "good", content: text },
  ]);
  await assert.rejects(take(zip, "locked"), /no member/);
  await assert.rejects(take(zip, "bzip2"), /no member/);
  assert.deepEqual(await take(zip, "good"), text);
});

test("zip: a directory that claims more entries or longer names than it has is refused", () => {
  assert.throws(() => parseDirectory(Buffer.alloc(0), 65_534), /entry 0 of 65534 is damaged or missing/);
  const zip = zipBytes([{ name: "m", content: text }]);
  const directory = Buffer.from(zip.subarray(zip.indexOf("PK\u0001\u0002"), zip.length - 22));
  assert.equal(parseDirectory(directory, 1).length, 1);
  directory.writeUInt16LE(0xffff, 28);
  assert.throws(() => parseDirectory(directory, 1), /reaches past the directory/);
});

test("zip: archives that need ZIP64 or are split are refused by name", async () => {
  const zip = zipBytes([{ name: "m", content: text }]);
  const end = zip.length - 22;
  const wide = Buffer.from(zip);
  wide.writeUInt32LE(0xffff_ffff, end + 16);
  await assert.rejects(take(wide, "m"), /ZIP64/);
  const split = Buffer.from(zip);
  split.writeUInt16LE(1, end + 4);
  await assert.rejects(take(split, "m"), /split/);
  const outside = Buffer.from(zip);
  outside.writeUInt32LE(zip.length, end + 16);
  await assert.rejects(take(outside, "m"), /outside the file/);
});
