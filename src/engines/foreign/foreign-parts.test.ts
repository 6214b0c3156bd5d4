import assert from "node:assert/strict";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, test } from "node:test";
import fc from "fast-check";
import type { KvEvent } from "../../protocol/index.ts";
import { LogRing } from "./log-ring.ts";
import { MirroredBlocks } from "./mirrored-blocks.ts";
import { claimFreePorts, claimName, claimPort } from "./port-claims.ts";
import { familiesWithPrefix, parsePrometheus, sumOf } from "./prometheus-text.ts";
import { SseReader } from "./sse-reader.ts";

describe("server-sent events", () => {
  test("however the bytes are cut, the events are the same", () => {
    const data = fc.string({ unit: "grapheme", maxLength: 20 }).map((text) => text.replaceAll(/[\r\n]/g, " "));
    fc.assert(
      fc.property(
        fc.array(data, { maxLength: 10 }),
        fc.boolean(),
        fc.array(fc.nat(40), { maxLength: 60 }),
        (all, isCrLf, cuts) => {
          const end = isCrLf ? "\r\n" : "\n";
          const bytes = Buffer.from(
            all.map((text) => `: a comment${end}event: x${end}data: ${text}${end}${end}`).join(""),
          );
          const got: string[] = [];
          const reader = new SseReader((text) => got.push(text));
          let at = 0;
          for (const cut of cuts) {
            reader.push(bytes.subarray(at, at + cut));
            at = Math.min(bytes.length, at + cut);
          }
          reader.push(bytes.subarray(at));
          reader.end();
          assert.deepEqual(got, all);
        },
      ),
    );
  });

  test("several data lines are one event; the last one needs no empty line; no space is needed", () => {
    const got: string[] = [];
    const reader = new SseReader((text) => got.push(text));
    reader.push(Buffer.from("data: a\ndata:b\n\n\n\ndata: c"));
    reader.end();
    assert.deepEqual(got, ["a\nb", "c"]);
  });
});

describe("log ring", () => {
  test("keeps the newest lines, bounded by count and by characters; searches in any case; colours are gone", () => {
    const ring = new LogRing({ maxLines: 3, maxChars: 20 });
    for (const line of ["one", "two", "three", "\u001b[31mFour\u001b[0m"]) ring.push(line);
    assert.deepEqual(ring.tail(10), ["two", "three", "Four"]);
    assert.deepEqual(ring.search("FO", 5), ["Four"]);
    assert.deepEqual(ring.search("", 2), ["three", "Four"]);
    ring.push("a line of 16 ch.");
    assert.deepEqual(ring.tail(10), ["Four", "a line of 16 ch."]);
    assert.equal(ring.lineCount, 5);
    for (let i = 0; i < 10_000; i++) ring.push(String(i));
    assert.deepEqual(ring.tail(2), ["9998", "9999"]);
  });
});

describe("Prometheus text", () => {
  const TEXT = [
    "# HELP vllm:a Help.",
    "# TYPE vllm:a gauge",
    'vllm:a{engine="0",name="x \\"y\\" \\\\ z, {q}"} 1.5',
    'vllm:a{engine="1",name="b"} 2 1700000000000',
    "python_b 7",
    "vllm:c +Inf",
    "vllm:d nonsense",
    "",
  ].join("\n");

  test("samples that are asked for, with labels of any content", () => {
    const samples = parsePrometheus(TEXT, new Set(["vllm:a", "vllm:c", "vllm:d"]));
    assert.deepEqual(samples, [
      { name: "vllm:a", labels: { engine: "0", name: 'x "y" \\ z, {q}' }, value: 1.5 },
      { name: "vllm:a", labels: { engine: "1", name: "b" }, value: 2 },
      { name: "vllm:c", labels: {}, value: Infinity },
    ]);
    assert.equal(sumOf(samples, "vllm:a"), 3.5);
    assert.equal(sumOf(samples, "vllm:none"), undefined);
  });

  test("families of a prefix, with their help", () => {
    const lines = familiesWithPrefix(TEXT, "vllm:").split("\n");
    assert.deepEqual(lines.slice(0, 2), ["# HELP vllm:a Help.", "# TYPE vllm:a gauge"]);
    assert.ok(lines.every((line) => !line.includes("python_b")));
    assert.equal(familiesWithPrefix(TEXT, "sglang:"), "");
  });
});

describe("ports and names", () => {
  test("a claim keeps others out until it is given back, and does not outlive its process", async () => {
    const folder = mkdtempSync(join(tmpdir(), "claims-"));
    const first = await claimFreePorts("127.0.0.1", 3, Math.random, folder);
    for (const port of [first.port, first.port + 2]) {
      await assert.rejects(claimPort("127.0.0.1", port, "--p", folder), new RegExp(`--p: port ${port} .* is claimed by process ${process.pid}`)); // prettier-ignore
    }
    first.release();
    (await claimPort("127.0.0.1", first.port + 1, "--p", folder)).release();
    // Left by a process that is gone: 2^22 is above the highest id that Linux gives.
    writeFileSync(join(folder, String(first.port)), "4194305");
    (await claimPort("127.0.0.1", first.port, "--p", folder)).release();
    const release = claimName("attached-http://h:1", folder);
    assert.equal(claimName("attached-http://h:1", folder), process.pid);
    assert.equal(typeof release, "function");
    (release as () => void)();
    assert.equal(typeof claimName("attached-http://h:1", folder), "function");
    rmSync(folder, { recursive: true });
  });
});

describe("mirrored blocks", () => {
  type Step = { readonly kind: "store" | "remove"; readonly blocks: readonly number[] } | { readonly kind: "clear" };
  const block = fc.integer({ min: 1, max: 3_000 });
  const step: fc.Arbitrary<Step> = fc.oneof(
    { weight: 5, arbitrary: fc.record({ kind: fc.constant("store" as const), blocks: fc.uniqueArray(block, { minLength: 1, maxLength: 200 }) }) }, // prettier-ignore
    { weight: 4, arbitrary: fc.record({ kind: fc.constant("remove" as const), blocks: fc.uniqueArray(block, { minLength: 1, maxLength: 200 }) }) }, // prettier-ignore
    { weight: 1, arbitrary: fc.constant({ kind: "clear" as const }) },
  );
  const pairs = (blocks: readonly number[]): Uint32Array => Uint32Array.from(blocks.flatMap((id) => [id, id * 7]));

  test("as a map of counts says: told when the first copy comes and when the last one goes", () => {
    fc.assert(
      fc.property(fc.array(step, { maxLength: 60 }), (steps) => {
        const mirror = new MirroredBlocks();
        const copies = new Map<number, number>();
        const told = new Set<number>();
        for (const one of steps) {
          const event: KvEvent =
            one.kind === "clear"
              ? { type: "cleared", dpRank: 0 }
              : one.kind === "remove"
                ? { type: "removed", dpRank: 0, tier: "device", sequenceHashes: pairs(one.blocks) }
                : { type: "stored", dpRank: 0, tier: "device", parentHash: undefined, startBlock: 0, sequenceHashes: pairs(one.blocks), localHashes: pairs(one.blocks) }; // prettier-ignore
          if (one.kind === "clear") copies.clear();
          else {
            for (const id of one.blocks) {
              const count = (copies.get(id) ?? 0) + (one.kind === "store" ? 1 : -1);
              if (count > 0) copies.set(id, count);
              else copies.delete(id);
            }
          }
          for (const out of mirror.apply([event])) {
            if (out.type === "cleared") told.clear();
            else {
              for (let i = 0; i < out.sequenceHashes.length; i += 2) {
                const id: number = out.sequenceHashes[i]!;
                assert.equal(told.has(id), out.type === "removed", `block ${id} is told once`);
                if (out.type === "removed") told.delete(id);
                else told.add(id);
              }
            }
          }
          assert.deepEqual(
            [...told].toSorted((a, b) => a - b),
            [...copies.keys()].toSorted((a, b) => a - b),
          );
          assert.equal(mirror.deviceBlockCount, copies.size);
        }
      }),
    );
  });

  test("a part of a stored event names its own parent and place", () => {
    const mirror = new MirroredBlocks();
    const stored = (ids: readonly number[]): KvEvent => ({ type: "stored", dpRank: 0, tier: "device", parentHash: [9, 9], startBlock: 4, sequenceHashes: pairs(ids), localHashes: pairs(ids) }); // prettier-ignore
    mirror.apply([stored([2])]);
    const out = mirror.apply([stored([1, 2, 3, 4])]);
    assert.deepEqual(
      out.map((event) =>
        event.type === "stored" ? [event.parentHash, event.startBlock, [...event.sequenceHashes]] : [],
      ),
      [
        [[9, 9], 4, [1, 7]],
        [[2, 14], 6, [3, 21, 4, 28]],
      ],
    );
    assert.equal(mirror.countLeading(pairs([1, 2, 3, 9])), 3);
  });
});
