import assert from "node:assert/strict";
import { mkdtempSync, readFileSync, rmSync, writeFileSync, existsSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, afterEach, before, beforeEach, test } from "node:test";
import fc from "fast-check";
import { ManualClock, systemClock } from "../std/index.ts";
import { LineSplitter } from "../std/line-splitter.ts";
import { RestartBackOff } from "../std/restart-back-off.ts";
import { SupervisedProcess, stopAll, type SupervisedOptions } from "./supervisor.ts";

/**
 * A child with the manners of a role: says when it is ready, leaves on SIGTERM and when its parent is gone. What it does
 * beyond that is a line of script per test.
 */
const PROGRAM = `
  const [script] = process.argv.slice(2);
  const fs = require("node:fs");
  const alive = setInterval(() => {}, 2 ** 30);
  process.on("disconnect", () => process.exit(0));
  process.on("SIGTERM", () => { console.log("leaving"); process.exit(0); });
  const ready = (facts = {}) => process.send({ type: "ready", facts });
  eval(script);
`;

let folder = "";
let program = "";
const started: SupervisedProcess[] = [];
before(() => {
  folder = mkdtempSync(join(tmpdir(), "supervisor-test-"));
  program = join(folder, "child.cjs");
  writeFileSync(program, PROGRAM);
});
after(() => rmSync(folder, { recursive: true, force: true }));
beforeEach(() => void started.splice(0));
afterEach(() => stopAll(started, systemClock, 0));

interface Watched {
  readonly child: SupervisedProcess;
  /** Resolves with the next line or notice that matches. */
  readonly seen: (pattern: RegExp) => Promise<string>;
}

const DEADLINE_MS = 10_000;

function supervise(script: string, options: Partial<SupervisedOptions> = {}): Watched {
  const texts: string[] = [];
  const waiting = new Set<() => void>();
  const add = (text: string): void => {
    texts.push(text);
    for (const look of waiting) look();
  };
  const child = new SupervisedProcess({
    name: "child-0",
    command: process.execPath,
    args: [program, script],
    env: process.env,
    clock: systemClock,
    onLine: add,
    onNotice: add,
    ...options,
  });
  started.push(child);
  const seen = (pattern: RegExp): Promise<string> =>
    new Promise((resolve, reject) => {
      const timer = setTimeout(
        () => reject(new Error(`no ${String(pattern)} in ${JSON.stringify(texts)}`)),
        DEADLINE_MS,
      );
      const look = (): void => {
        const index = texts.findIndex((text) => pattern.test(text));
        if (index === -1) return;
        clearTimeout(timer);
        waiting.delete(look);
        resolve(texts.splice(index, 1)[0]!);
      };
      waiting.add(look);
      look();
    });
  return { child, seen };
}

test("a child that is told to leave by somebody else finishes, and is started again without back-off", async () => {
  const { child, seen } = supervise("ready()");
  child.start();
  await child.ready;
  for (let i = 0; i < 3; i++) {
    const { pid } = child;
    process.kill(pid!, "SIGTERM");
    await seen(/leaving/);
    await seen(/ended with exit code 0; restarting in 0.2 s/);
    await seen(/serves again/);
    assert.notEqual(child.pid, pid);
  }
});

test("back-off: doubles from 0.2 s to 10 s, and starts over after half a minute of health", () => {
  const backOff = new RestartBackOff();
  const pauses = Array.from({ length: 8 }, () => backOff.next(1_000));
  assert.deepEqual(pauses, [200, 400, 800, 1_600, 3_200, 6_400, 10_000, 10_000]);
  assert.equal(backOff.next(29_999), 10_000);
  assert.equal(backOff.next(30_000), 200);
  assert.equal(backOff.next(0), 400);
});

test("supervisor: a child that serves says so with its facts; its lines come through whole", async () => {
  const { child, seen } = supervise(
    'console.error("half a "); process.stdout.write("no newline at the end"); ready({ port: 7 })',
  );
  child.start();
  assert.deepEqual(await child.ready, { port: 7 });
  assert.equal(await seen(/half/), "half a ");
  await stopAll([child], systemClock, DEADLINE_MS);
  await seen(/no newline at the endleaving/);
  assert.equal(child.pid, undefined);
});

test("supervisor: a crashed child is started again after the back-off, each time later", async () => {
  const clock = new ManualClock();
  const { child, seen } = supervise('ready(); console.log("up")', { clock });
  child.start();
  await child.ready;
  for (const [pause, notice] of [
    [200, "0.2 s"],
    [400, "0.4 s"],
    [800, "0.8 s"],
  ] as const) {
    await seen(/up/);
    const { pid } = child;
    process.kill(pid!, "SIGKILL");
    assert.equal(await seen(/restarting/), `child-0 (pid ${pid}) was ended by SIGKILL; restarting in ${notice}`);
    assert.equal(child.pid, undefined);
    clock.advance(pause - 1);
    assert.equal(child.pid, undefined, "not before its time");
    clock.advance(1);
    assert.notEqual(child.pid, undefined);
    await seen(/serves again/);
  }
  await seen(/up/);
  clock.advance(30_000);
  child.stop("SIGTERM");
  await child.ended;
  assert.equal(clock.pendingTimerCount, 0);
});

test("supervisor: after half a minute of health the pause is short again", async () => {
  const clock = new ManualClock();
  const { child, seen } = supervise('ready(); console.log("up")', { clock });
  child.start();
  for (const [healthyMs, notice, pauseMs] of [
    [0, /in 0\.2 s/, 200],
    [29_000, /in 0\.4 s/, 400],
    [30_000, /in 0\.2 s/, 200],
  ] as const) {
    await seen(/up/);
    clock.advance(healthyMs);
    process.kill(child.pid!, "SIGKILL");
    await seen(notice);
    clock.advance(pauseMs);
  }
  await seen(/up/);
});

test("supervisor: a child that ends by itself before it served fails the start, with its exit code", async () => {
  const { child } = supervise('console.error("wrong file"); process.exit(3)');
  child.start();
  await assert.rejects(child.ready, /child-0 did not start: it ended with exit code 3/);
  await child.ended;
});

test("supervisor: a child that a signal keeps ending before it served fails the start after three times", async () => {
  const clock = new ManualClock();
  const { child, seen } = supervise('process.kill(process.pid, "SIGKILL")', { clock });
  child.start();
  await seen(/restarting in 0\.2 s/);
  clock.advance(200);
  await seen(/restarting in 0\.4 s/);
  clock.advance(400);
  await assert.rejects(child.ready, /was ended by SIGKILL/);
});

test("supervisor: a program that is not there fails the start", async () => {
  const { child } = supervise("", { command: join(folder, "nothing") });
  child.start();
  await assert.rejects(child.ready, /could not be started: .*ENOENT/);
  await child.ended;
});

test("supervisor: a child that does not leave in time is killed", async () => {
  const clock = new ManualClock();
  const { child, seen } = supervise(
    'process.removeAllListeners("SIGTERM"); process.on("SIGTERM", () => console.log("no")); ready()',
    { clock },
  );
  child.start();
  await child.ready;
  const stopped = stopAll([child], clock, 5_000);
  await seen(/no/);
  clock.advance(4_999);
  assert.notEqual(child.pid, undefined);
  clock.advance(1);
  await stopped;
  assert.equal(child.pid, undefined);
});

test("supervisor: stopping while a restart is pending starts nothing", async () => {
  const clock = new ManualClock();
  const { child, seen } = supervise("ready()", { clock });
  child.start();
  await child.ready;
  process.kill(child.pid!, "SIGKILL");
  await seen(/restarting/);
  child.stop("SIGTERM");
  await child.ended;
  clock.advance(60_000);
  assert.equal(child.pid, undefined);
  assert.equal(clock.pendingTimerCount, 0);
});

test("supervisor: when the parent is killed its children leave by themselves", async () => {
  const pidFile = join(folder, "grandchild.pid");
  const parent = join(folder, "parent.ts");
  const here = (name: string): string => JSON.stringify(join(import.meta.dirname, name));
  const script = `fs.writeFileSync(${JSON.stringify(pidFile)}, String(process.pid)); ready()`;
  writeFileSync(
    parent,
    `import { SupervisedProcess } from ${here("supervisor.ts")};
     import { systemClock } from ${here("../std/index.ts")};
     const child = new SupervisedProcess({ name: "g", command: process.execPath, args: [${JSON.stringify(program)}, ${JSON.stringify(script)}],
       env: process.env, clock: systemClock, onLine: () => {}, onNotice: () => {} });
     child.start();
     await child.ready;
     process.send({ type: "ready", facts: {} });`,
  );
  const { child } = supervise("", { args: [parent] });
  child.start();
  await child.ready;
  const grandchild = Number(readFileSync(pidFile, "utf8"));
  assert.ok(isRunning(grandchild));
  child.stop("SIGKILL");
  await child.ended;
  const deadline = Date.now() + DEADLINE_MS;
  while (isRunning(grandchild)) {
    assert.ok(Date.now() < deadline, "the grandchild is still there");
    await new Promise((resolve) => setImmediate(resolve));
  }
});

/** A zombie waits for its parent only; it counts as gone. */
function isRunning(pid: number): boolean {
  const status = `/proc/${pid}/status`;
  if (existsSync("/proc/self/status")) return existsSync(status) && !/^State:\s+Z/m.test(readStatus(status));
  try {
    return process.kill(pid, 0);
  } catch {
    return false;
  }
}

function readStatus(path: string): string {
  try {
    return readFileSync(path, "utf8");
  } catch {
    return "State: Z";
  }
}

test("lines: any split of the bytes gives the same lines", () => {
  fc.assert(
    fc.property(fc.string({ unit: "grapheme" }), fc.array(fc.nat(200)), (noise, cuts) => {
      const text = `first ${noise}\nzweite Zeile é 日\r\n\nlast without end`;
      const bytes = Buffer.from(text);
      const lines: string[] = [];
      const splitter = new LineSplitter((line) => lines.push(line));
      let from = 0;
      for (const cut of [...cuts.toSorted((a, b) => a - b), bytes.length]) {
        splitter.push(bytes.subarray(from, cut));
        from = Math.max(from, Math.min(cut, bytes.length));
      }
      splitter.end();
      assert.deepEqual(
        lines,
        text.split("\n").map((line) => line.replace(/\r$/, "")),
      );
    }),
    { numRuns: 100 },
  );
});

test("lines: one that never ends is cut, so that memory stays bounded", () => {
  const lines: string[] = [];
  const splitter = new LineSplitter((line) => lines.push(line));
  for (let i = 0; i < 200; i++) splitter.push(Buffer.alloc(1_024, 0x61));
  assert.deepEqual(
    lines.map(({ length }) => length),
    [65_536, 65_536, 65_536],
  );
});
