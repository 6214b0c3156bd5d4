import assert from "node:assert/strict";
import { test } from "node:test";
import { SeededRandom } from "../../std/index.ts";
import { BlockTable, findBlock } from "./block-table.ts";
import { FlatKvMemory, RECORD_HI, RECORD_LO, RECORD_WORDS } from "./flat-kv-memory.ts";

const SEGMENT_SLOTS = 1_024;

function aTable({ maxSlots = 2 ** 20, records = 110_000 } = {}) {
  const memory = new FlatKvMemory({ records, slots: Math.max(maxSlots, 2 * SEGMENT_SLOTS), nodes: 10 });
  memory.ensureRecords(records);
  return { memory, table: new BlockTable(memory, maxSlots) };
}

function setHash(memory: FlatKvMemory, record: number, lo: number, hi: number): void {
  memory.records[record * RECORD_WORDS + RECORD_LO] = lo;
  memory.records[record * RECORD_WORDS + RECORD_HI] = hi;
}

test("block table: agrees with a Map while many thousands of entries come and go", () => {
  const random = new SeededRandom(1);
  const { memory, table } = aTable();
  const model = new Map<number, readonly [number, number]>();
  const order: number[] = [];
  let oldest = 0;
  const free = Array.from({ length: 100_000 }, (_, i) => 100_000 - i);
  for (let i = 0; i < 160_000; i++) {
    // Grows to the middle, shrinks from there.
    const isAdded = random.nextFloat() < (i < 100_000 ? 0.9 : 0.1);
    if (isAdded && free.length > 0) {
      const record = free.pop()!;
      // Every other hash differs from its neighbour in one half only.
      const hash = [random.nextU32(), i % 2 === 0 ? 7 : random.nextU32()] as const;
      setHash(memory, record, ...hash);
      assert.equal(findBlock(memory, ...hash), 0);
      assert.equal(table.tryAdd(record), true);
      model.set(record, hash);
      order.push(record);
      assert.equal(findBlock(memory, ...hash), record);
    } else {
      const record = order[oldest++];
      const hash = record === undefined ? undefined : model.get(record);
      if (record === undefined || hash === undefined) break;
      assert.equal(findBlock(memory, ...hash), record);
      table.remove(record);
      model.delete(record);
      free.push(record);
      assert.equal(findBlock(memory, ...hash), 0);
    }
    if (i % 40_000 === 39_999) for (const [record, hash] of model) assert.equal(findBlock(memory, ...hash), record);
  }
});

test("block table: without room for another segment it refuses, keeps what it has, and takes more once some went", () => {
  const random = new SeededRandom(2);
  const { memory, table } = aTable({ maxSlots: 4 * SEGMENT_SLOTS, records: 5_000 });
  let added = 0;
  for (let record = 1; record < 5_000; record++) {
    setHash(memory, record, random.nextU32(), random.nextU32());
    if (!table.tryAdd(record)) break;
    added++;
  }
  assert.ok(added > 2 * SEGMENT_SLOTS && added < 4 * SEGMENT_SLOTS, `${added} entries`);
  const hashOf = (record: number): [number, number] => [
    memory.records[record * RECORD_WORDS + RECORD_LO]!,
    memory.records[record * RECORD_WORDS + RECORD_HI]!,
  ];
  for (let record = 1; record <= added; record++) assert.equal(findBlock(memory, ...hashOf(record)), record);
  for (let record = 1; record <= added; record++) table.remove(record);
  for (let record = 1; record <= added; record++) assert.equal(findBlock(memory, ...hashOf(record)), 0);
  assert.equal(table.tryAdd(1), true);
});
