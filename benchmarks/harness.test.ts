import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import test from "node:test";
import { cpuTimeOf, machineLine, median, paired, residentBytes, table } from "./harness.ts";

const isLinux = process.platform === "linux";
const onlyLinux = isLinux ? {} : { skip: "reads /proc, which only Linux has" };

test("bench harness: the machine line names CPU, cores, memory, runtime and commit", () => {
  assert.match(machineLine(), /^.+ · \d+ cores · \d+ GiB · node v\d+\.\d+\.\d+ · commit \S+/);
});

test("bench harness: paired rounds alternate after one warm-up, and compare round by round", async () => {
  const order: string[] = [];
  const values = { a: [99, 10, 40, 30], b: [99, 5, 10, 10] };
  const measure = (name: "a" | "b") => () => {
    order.push(name);
    return values[name].shift()!;
  };
  const result = await paired(measure("a"), measure("b"), { rounds: 3 });
  assert.equal(order.join(""), "ab" + "abbaab");
  assert.deepEqual(result, {
    a: [10, 40, 30],
    b: [5, 10, 10],
    medianA: 30,
    medianB: 10,
    ratio: 3,
    ratioRange: [2, 4],
  });
});

test("bench harness: the median of an even count is between the middle two, of none it is no number", () => {
  assert.equal(median([4, 1, 3, 2]), 2.5);
  assert.ok(Number.isNaN(median([])));
});

test("bench harness: CPU time and memory of a process are the kernel's", onlyLinux, () => {
  const before = cpuTimeOf(process.pid);
  const own = process.cpuUsage();
  const untilMs = performance.now() + 150;
  while (performance.now() < untilMs) Math.sqrt(untilMs);
  const after = cpuTimeOf(process.pid);
  const { user, system } = process.cpuUsage(own);
  const seenMs = after.userMs + after.systemMs - before.userMs - before.systemMs;
  assert.ok(Math.abs(seenMs - (user + system) / 1000) <= 40, `${seenMs} ms for ${(user + system) / 1000} ms`);
  const rss = process.memoryUsage.rss();
  assert.ok(Math.abs(residentBytes(process.pid) - rss) < rss * 0.2);
  assert.throws(() => cpuTimeOf(2 ** 30), /no accounting of process/);
});

test("bench harness: a table aligns numbers right and text left", () => {
  assert.equal(
    table([
      { what: "ours", microseconds: 1.234 },
      { what: "theirs", microseconds: 100 },
    ]),
    ["what    microseconds", "------  ------------", "ours            1.23", "theirs           100"].join("\n"),
  );
});

test("bench runner: an unknown name is refused with the names there are", () => {
  const run = spawnSync(process.execPath, [`${import.meta.dirname}/run.ts`, "no-such"], { encoding: "utf8" });
  assert.equal(run.status, 2);
  assert.match(run.stderr, /unknown benchmark: no-such; there are: .*hashing/);
});
