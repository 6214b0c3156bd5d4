import assert from "node:assert/strict";
import { spawn, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { existsSync } from "node:fs";
import { chmod, mkdir, mkdtemp, readdir, readFile, rename, rm, stat, symlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, it } from "node:test";
import { DynamoError } from "../../errors/index.ts";
import { createLogger, type Logger } from "../../observability/index.ts";
import { ManualClock } from "../../std/index.ts";
import type { JsonValue } from "./base.ts";
import { ChangeRecorder, discoveryBattery, rejectsWith, valuesOf } from "./discovery.battery.ts";
import { FileDiscovery } from "./file.ts";

discoveryBattery(
  "file",
  async () => {
    const root = await mkdtemp(join(tmpdir(), "discovery-"));
    return {
      open: () => Promise.resolve(new FileDiscovery({ root, pollMs: 20 })),
      cleanup: () => rm(root, { recursive: true }),
    };
  },
  { historyCount: 12 },
);

/** One store under test: views that share virtual time or have their own, and all log lines. */
class Bench {
  readonly root: string;
  readonly clock = new ManualClock();
  readonly lines: { message: string; [field: string]: unknown }[] = [];
  readonly logger: Logger = createLogger({
    level: "debug",
    format: "jsonl",
    write: (line) => this.lines.push(JSON.parse(line) as { message: string }),
  });
  readonly #views: FileDiscovery[] = [];

  constructor(root: string) {
    this.root = root;
  }

  open(clock: ManualClock = this.clock): FileDiscovery {
    const view = new FileDiscovery({ root: this.root, clock, logger: this.logger, pollMs: 100 });
    this.#views.push(view);
    return view;
  }

  openInRealTime(): FileDiscovery {
    const view = new FileDiscovery({ root: this.root, logger: this.logger, pollMs: 20 });
    this.#views.push(view);
    return view;
  }

  /** Log lines with this text. */
  logged(text: string): number {
    return this.lines.filter(({ message }) => message.includes(text)).length;
  }

  leasePath(leaseId: string, ...rest: string[]): string {
    return join(this.root, "leases", leaseId, ...rest);
  }

  /** The path of the only key file of a lease. */
  async keyFile(leaseId: string): Promise<string> {
    const names = (await readdir(this.leasePath(leaseId))).filter((name) => /^[0-9a-f]{32}\.\d+$/.test(name));
    assert.equal(names.length, 1);
    return this.leasePath(leaseId, names[0]!);
  }

  async close(): Promise<void> {
    await Promise.all(this.#views.map((view) => view.close()));
    await rm(this.root, { recursive: true, force: true });
  }
}

/** Polls a condition that nothing announces, with a deadline. */
async function until(what: string, condition: () => boolean | Promise<boolean>): Promise<void> {
  const endMs = performance.now() + 5_000;
  while (!(await condition())) {
    assert.ok(performance.now() < endMs, `never came: ${what}`);
    await new Promise((resolve) => setImmediate(resolve));
  }
}

/**
 * Virtual time forward in steps of a poll; after each, waits for the disk work that the step started, which ends with
 * its next timer.
 */
async function pass(clock: ManualClock, ms: number, timers = 1): Promise<void> {
  for (let passed = 0; passed < ms; passed += 100) {
    clock.advance(100);
    await until("the next timer", () => clock.pendingTimerCount >= timers);
  }
}

function bench(run: (bench: Bench) => Promise<void>): () => Promise<void> {
  return async () => {
    const made = new Bench(join(await mkdtemp(join(tmpdir(), "discovery-")), "store"));
    try {
      await run(made);
    } finally {
      await made.close();
      await rm(join(made.root, ".."), { recursive: true });
    }
  };
}

async function startHolder(
  root: string,
  ttlMs: number,
  ...keys: string[]
): Promise<{ child: ChildProcess; leaseId: string }> {
  const script = join(import.meta.dirname, "file-holder.fixture.ts");
  const child = spawn(process.execPath, [script, root, String(ttlMs), ...keys], { stdio: ["pipe", "pipe", "inherit"] });
  const [chunk] = (await once(child.stdout!, "data")) as [Buffer];
  return { child, leaseId: chunk.toString().trim() };
}

async function kill(child: ChildProcess, signal: NodeJS.Signals = "SIGKILL"): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const exited = once(child, "exit");
  child.kill(signal);
  await exited;
}

const linuxOnly = process.platform === "linux" ? {} : { skip: "needs Linux's process table and /dev/full" };

describe("file discovery: a holder that dies", () => {
  it(
    "keys of a killed process on this machine vanish at once, long before its lease would expire",
    linuxOnly,
    bench(async (b) => {
      const watcher = b.openInRealTime();
      const { child, leaseId } = await startHolder(b.root, 600_000, "v1/a", "v1/b");
      try {
        const seen = new ChangeRecorder();
        await watcher.watch("", seen.listener);
        assert.deepEqual(seen.values, { "v1/a": { pid: child.pid! }, "v1/b": { pid: child.pid! } });
        await kill(child);
        await seen.becomes({});
        assert.equal(seen.expired.size, 0, "proven gone");
        assert.ok(existsSync(b.leasePath(leaseId)), "its files stay for the others to judge by");
      } finally {
        await kill(child);
      }
    }),
  );

  it(
    "a process that starts later does not see them either",
    linuxOnly,
    bench(async (b) => {
      const { child } = await startHolder(b.root, 600_000, "v1/a");
      await kill(child);
      assert.deepEqual(await b.open().list(""), []);
    }),
  );

  it(
    "a stopped process loses its lease and learns of it when it runs again",
    linuxOnly,
    bench(async (b) => {
      const watcher = b.openInRealTime();
      const { child } = await startHolder(b.root, 1_000, "v1/a");
      try {
        const seen = new ChangeRecorder();
        await watcher.watch("", seen.listener);
        assert.equal(seen.state.size, 1);
        child.kill("SIGSTOP");
        const startMs = performance.now();
        await seen.becomes({});
        assert.deepEqual([...seen.expired], ["v1/a"], "it lives, and only its lease expired");
        const tookMs = performance.now() - startMs;
        assert.ok(tookMs > 200, `took ${tookMs} ms`);
        child.kill("SIGCONT");
      } finally {
        await kill(child);
      }
    }),
  );

  it(
    "a process that leaves in order takes its keys along",
    bench(async (b) => {
      const watcher = b.openInRealTime();
      const { child, leaseId } = await startHolder(b.root, 600_000, "v1/a");
      try {
        const seen = new ChangeRecorder();
        await watcher.watch("", seen.listener);
        const exited = once(child, "exit");
        child.stdin!.end();
        await seen.becomes({});
        assert.equal(seen.expired.size, 0);
        assert.deepEqual(await exited, [0, null]);
        assert.ok(!existsSync(b.leasePath(leaseId)));
      } finally {
        await kill(child);
      }
    }),
  );

  it(
    "a silent holder on another machine is given up within its TTL, by the watcher's clock alone",
    bench(async (b) => {
      const [frozen, mine] = [new ManualClock(), b.clock];
      const lease = await b.open(frozen).openLease({ ttlMs: 10_000 });
      await lease.put("v1/a", 1);
      const seen = new ChangeRecorder();
      await b.open().watch("", seen.listener);
      mine.wallOffsetMs += 1e9;
      await pass(mine, 6_500);
      mine.wallOffsetMs -= 5e9;
      assert.deepEqual(seen.values, { "v1/a": 1 });
      await pass(mine, 3_500);
      assert.deepEqual(seen.values, {});
      // It was only slow: one heartbeat, and it is back.
      frozen.advance(2_500);
      await until("its heartbeat", () => frozen.pendingTimerCount === 1);
      await pass(mine, 1_000);
      assert.deepEqual(seen.values, { "v1/a": 1 });
    }),
  );

  it(
    "a live holder is kept for any length of time",
    bench(async (b) => {
      const lease = await b.open().openLease({ ttlMs: 1_000 });
      await lease.put("v1/a", 1);
      const seen = new ChangeRecorder();
      await b.open().watch("", seen.listener);
      await pass(b.clock, 20_000, 2);
      assert.equal(seen.changes.length, 1);
    }),
  );

  it(
    "a watcher that stalled does not take its own pause for the holders' silence",
    bench(async (b) => {
      const holderClock = new ManualClock();
      const lease = await b.open(holderClock).openLease({ ttlMs: 10_000 });
      await lease.put("v1/a", 1);
      const seen = new ChangeRecorder();
      await b.open().watch("", seen.listener);
      // One hour in one step: a suspended machine. The first look afterwards finds an unchanged heartbeat.
      b.clock.advance(3_600_000);
      await until("the look", () => b.clock.pendingTimerCount === 1);
      await pass(b.clock, 1_000);
      assert.deepEqual(seen.values, { "v1/a": 1 });
    }),
  );

  it(
    "a reused pid does not keep a dead holder's keys alive",
    linuxOnly,
    bench(async (b) => {
      const lease = await b.open(new ManualClock()).openLease();
      await lease.put("v1/a", 1);
      const terms = b.leasePath(lease.id, "lease");
      const { seal, unseal } = await import("./sealed-record.ts");
      const record = unseal("lease", await readFile(terms))!;
      const holder = record["holder"] as { startTicks: number };
      await writeFile(terms, seal("lease", { ...record, holder: { ...holder, startTicks: holder.startTicks - 1 } }));
      assert.deepEqual(await b.open().list(""), []);
    }),
  );

  it(
    "a pid of another machine or container is not looked up here",
    bench(async (b) => {
      const lease = await b.open(new ManualClock()).openLease();
      await lease.put("v1/a", 1);
      const terms = b.leasePath(lease.id, "lease");
      const { seal, unseal } = await import("./sealed-record.ts");
      const record = unseal("lease", await readFile(terms))!;
      const holder = { ...(record["holder"] as object), pid: 0x7fff_fffe, machine: "another boot/pid:[1]" };
      await writeFile(terms, seal("lease", { ...record, holder }));
      assert.deepEqual(valuesOf(await b.open().list("")), { "v1/a": 1 });
    }),
  );
});

describe("file discovery: what the dead leave", () => {
  it(
    "is swept by a watcher, first the files, then the tombstone",
    linuxOnly,
    bench(async (b) => {
      const { child, leaseId } = await startHolder(b.root, 600_000, "v1/a");
      await kill(child);
      await b.open().watch("", () => undefined);
      await pass(b.clock, 4_000);
      assert.ok(existsSync(b.leasePath(leaseId)));
      await pass(b.clock, 4_000);
      assert.ok(!existsSync(b.leasePath(leaseId)));
      assert.deepEqual(await readdir(join(b.root, "closed", leaseId)), []);
      await writeFile(join(b.root, "beats", "0123456789abcdef.7"), "");
      await pass(b.clock, 34_000);
      assert.deepEqual(await readdir(join(b.root, "closed")), []);
      assert.deepEqual(await readdir(join(b.root, "beats")), []);
    }),
  );

  it(
    "a silent holder is swept after three TTLs and then learns that its lease was revoked",
    bench(async (b) => {
      const frozen = new ManualClock();
      const lease = await b.open(frozen).openLease({ ttlMs: 2_000 });
      await lease.put("v1/a", 1);
      await b.open().watch("", () => undefined);
      await pass(b.clock, 5_500);
      assert.ok(existsSync(b.leasePath(lease.id)));
      await pass(b.clock, 2_000);
      assert.ok(!existsSync(b.leasePath(lease.id)));
      frozen.advance(500);
      await lease.lost;
      await assert.rejects(lease.put("v1/b", 1), rejectsWith("lease-lost"));
    }),
  );
});

describe("file discovery: damage", () => {
  const damages: [string, (path: string) => Promise<void>][] = [
    ["cut in half", async (path) => writeFile(path, (await readFile(path)).subarray(0, 40))],
    ["empty", (path) => writeFile(path, "")],
    ["other bytes", (path) => writeFile(path, Buffer.alloc(300, 0xff))],
    [
      "one flipped bit",
      async (path) => {
        const bytes = await readFile(path);
        bytes[bytes.length - 5]! ^= 1;
        await writeFile(path, bytes);
      },
    ],
    ["far too long", (path) => writeFile(path, Buffer.alloc(3 * 1024 * 1024, 0x20))],
    [
      "a folder",
      async (path) => {
        await rm(path);
        await mkdir(path);
      },
    ],
    [
      "a link to itself",
      async (path) => {
        await rm(path);
        await symlink(path, path);
      },
    ],
  ];
  for (const [what, damage] of damages) {
    it(
      `a key file that is ${what} is ignored, logged once and used when it is whole again`,
      bench(async (b) => {
        const lease = await b.open(new ManualClock()).openLease();
        await lease.put("v1/a", { some: "value" });
        const other = await b.open(new ManualClock()).openLease();
        await other.put("v1/b", 2);
        const path = await b.keyFile(lease.id);
        const whole = await readFile(path);
        await damage(path);
        const seen = new ChangeRecorder();
        await b.open().watch("", seen.listener);
        await pass(b.clock, 3_000);
        assert.deepEqual(seen.values, { "v1/b": 2 });
        assert.equal(b.logged("unreadable"), 1);
        await rm(path, { recursive: true });
        await writeFile(path, whole);
        await pass(b.clock, 1_100);
        assert.deepEqual(seen.values, { "v1/a": { some: "value" }, "v1/b": 2 });
      }),
    );
  }

  it(
    "a holder finds its damaged or deleted files at the next renewal and writes them again",
    bench(async (b) => {
      const holderClock = new ManualClock();
      const lease = await b.open(holderClock).openLease({ ttlMs: 4_000 });
      await lease.put("v1/a", 1);
      const path = await b.keyFile(lease.id);
      const whole = await readFile(path);
      for (const damage of [
        () => rm(path),
        () => writeFile(path, "torn"),
        () => writeFile(b.leasePath(lease.id, "lease"), ""),
      ]) {
        await damage();
        await pass(holderClock, 1_000);
        assert.deepEqual(await readFile(path), whole);
        assert.deepEqual(valuesOf(await b.open().list("")), { "v1/a": 1 });
      }
    }),
  );

  it(
    "a file whose content says another key or lease than its name is ignored",
    bench(async (b) => {
      const lease = await b.open(new ManualClock()).openLease();
      await lease.put("v1/a", 1);
      const other = await b.open(new ManualClock()).openLease();
      await other.put("v1/b", 1);
      const path = await b.keyFile(lease.id);
      await writeFile(b.leasePath(other.id, path.slice(-34).replace(/^.*\//, "")), await readFile(path));
      await writeFile(b.leasePath(lease.id, `${"0".repeat(32)}.9`), await readFile(path));
      assert.deepEqual(valuesOf(await b.open().list("")), { "v1/a": 1, "v1/b": 1 });
    }),
  );

  it(
    "stray files, folders and temporary files of others are no leases and no keys",
    bench(async (b) => {
      const discovery = b.open();
      const lease = await discovery.openLease();
      await lease.put("v1/a", 1);
      await mkdir(join(b.root, "leases", "not-a-lease"));
      await mkdir(join(b.root, "leases", "0123456789abcdef"));
      await writeFile(join(b.root, "leases", "fedcba9876543210"), "a file");
      await writeFile(b.leasePath(lease.id, `${"0".repeat(32)}.1.aabbcc.tmp`), "half");
      await writeFile(join(b.root, "changes"), "scribbled over\n");
      assert.deepEqual(valuesOf(await discovery.list("")), { "v1/a": 1 });
      assert.deepEqual(valuesOf(await b.open().list("")), { "v1/a": 1 });
    }),
  );
});

describe("file discovery: a store that goes away", () => {
  it(
    "a deleted lease folder is written again by its holder, and no watcher sees a gap",
    bench(async (b) => {
      const holderClock = new ManualClock();
      const lease = await b.open(holderClock).openLease({ ttlMs: 10_000 });
      await lease.put("v1/a", 1);
      const seen = new ChangeRecorder();
      await b.open().watch("", seen.listener);
      await rename(b.leasePath(lease.id), join(b.root, "elsewhere"));
      await pass(b.clock, 2_000);
      holderClock.advance(2_500);
      await until("the next renewal", () => holderClock.pendingTimerCount === 1);
      await pass(b.clock, 2_000);
      assert.equal(seen.changes.length, 1);
      await lease.put("v1/a", 2);
      await pass(b.clock, 100);
      assert.deepEqual(seen.values, { "v1/a": 2 });
    }),
  );

  it(
    "a put into a deleted lease folder writes it again at once",
    bench(async (b) => {
      const lease = await b.open().openLease();
      await lease.put("v1/a", 1);
      await rm(b.leasePath(lease.id), { recursive: true });
      await lease.put("v1/b", 2);
      assert.deepEqual(valuesOf(await b.open().list("")), { "v1/a": 1, "v1/b": 2 });
    }),
  );

  it(
    "a deleted folder whose holder is silent too is an end, within the TTL",
    bench(async (b) => {
      const lease = await b.open(new ManualClock()).openLease({ ttlMs: 10_000 });
      await lease.put("v1/a", 1);
      const seen = new ChangeRecorder();
      await b.open().watch("", seen.listener);
      await rm(b.leasePath(lease.id), { recursive: true });
      await pass(b.clock, 10_000);
      assert.deepEqual(seen.values, {});
    }),
  );

  it(
    "while the root is gone the last known set stays and health says why; when it is back it is compared",
    bench(async (b) => {
      const [clock1, clock2] = [new ManualClock(), new ManualClock()];
      const lease1 = await b.open(clock1).openLease({ ttlMs: 10_000 });
      const lease2 = await b.open(clock2).openLease({ ttlMs: 10_000 });
      await lease1.put("v1/a", 1);
      await lease2.put("v1/b", 2);
      const watcher = b.open();
      const seen = new ChangeRecorder();
      await watcher.watch("", seen.listener);
      await rm(b.root, { recursive: true });
      await pass(b.clock, 60_000);
      assert.equal(seen.changes.length, 2);
      assert.equal(watcher.health().healthy, false);
      assert.match(watcher.health().detail ?? "", /ENOENT/);
      assert.equal(b.logged("keeping the last known set"), 1);
      await assert.rejects(watcher.list(""), rejectsWith("discovery-unavailable"));
      // The first holder renews and makes the store again; the second never does.
      clock1.advance(2_500);
      await until("the first holder's renewal", () => clock1.pendingTimerCount === 1);
      await pass(b.clock, 3_000);
      assert.deepEqual(watcher.health(), { healthy: true });
      assert.equal(seen.changes.length, 2, "the second has its TTL to come back");
      clock1.advance(2_500);
      await pass(b.clock, 6_000);
      assert.deepEqual(seen.values, { "v1/a": 1 });
    }),
  );

  it(
    "a root that is no folder any more is treated alike, and recovers",
    bench(async (b) => {
      const lease = await b.open(new ManualClock()).openLease();
      await lease.put("v1/a", 1);
      const watcher = b.open();
      const seen = new ChangeRecorder();
      await watcher.watch("", seen.listener);
      await rename(b.root, `${b.root}.aside`);
      await writeFile(b.root, "not a folder");
      await pass(b.clock, 1_000);
      assert.equal(watcher.health().healthy, false);
      await assert.rejects(lease.put("v1/b", 1), rejectsWith("discovery-unavailable"));
      await assert.rejects(b.open().openLease(), rejectsWith("discovery-unavailable"));
      await rm(b.root);
      await rename(`${b.root}.aside`, b.root);
      await pass(b.clock, 1_000);
      assert.deepEqual(watcher.health(), { healthy: true });
      assert.equal(seen.changes.length, 1);
    }),
  );

  it(
    "a store that cannot be written shows in health, and the lease is lost after a TTL without a renewal",
    bench(async (b) => {
      const discovery = b.open();
      const lease = await discovery.openLease({ ttlMs: 4_000 });
      await lease.put("v1/a", 1);
      await rm(join(b.root, "beats"), { recursive: true });
      await writeFile(join(b.root, "beats"), "in the way");
      await pass(b.clock, 1_000);
      assert.match(discovery.health().detail ?? "", /EEXIST/);
      const early = await Promise.race([lease.lost.then(() => "lost"), Promise.resolve("held")]);
      assert.equal(early, "held");
      for (let i = 0; i < 4; i++) {
        b.clock.advance(1_000);
        await until("the renewal", () => b.clock.pendingTimerCount === 1 || b.logged("lease lost") === 1);
      }
      await lease.lost;
      await assert.rejects(lease.put("v1/a", 2), rejectsWith("lease-lost"));
      assert.equal(b.logged("not renewed"), 1);
    }),
  );

  it(
    "watchers of a store that comes back look at it spread over a second, not all at once",
    bench(async (b) => {
      const holder = b.open();
      const lease = await holder.openLease();
      await lease.put("v1/a", 1);
      const watchers = await Promise.all(
        Array.from({ length: 20 }, async () => {
          const view = b.open();
          await view.watch("v1/", () => undefined);
          return view;
        }),
      );
      const timers = watchers.length + 1;
      await rename(b.root, `${b.root}.aside`);
      await writeFile(b.root, "in the way");
      await pass(b.clock, 2_000, timers);
      assert.ok(watchers.every((view) => !view.health().healthy));
      await rm(b.root);
      await rename(`${b.root}.aside`, b.root);
      const perStep: number[] = [];
      for (let well = 0; well < watchers.length && perStep.length < 20;) {
        await pass(b.clock, 100, timers);
        const now = watchers.filter((view) => view.health().healthy).length;
        perStep.push(now - well);
        well = now;
      }
      assert.equal(
        perStep.reduce((sum, count) => sum + count, 0),
        watchers.length,
        perStep.join(" "),
      );
      assert.ok(perStep.length <= 11, `back after ${perStep.length * 100} ms`);
      assert.ok(Math.max(...perStep) <= 9, `looks per 100 ms: ${perStep.join(" ")}`);
    }),
  );

  it(
    "a store that can be written again in time saves the lease",
    bench(async (b) => {
      const discovery = b.open();
      const lease = await discovery.openLease({ ttlMs: 4_000 });
      await lease.put("v1/a", 1);
      const beats = join(b.root, "beats");
      await rename(beats, `${beats}.aside`);
      await writeFile(beats, "in the way");
      await pass(b.clock, 2_000);
      assert.equal(discovery.health().healthy, false);
      await rm(beats);
      await rename(`${beats}.aside`, beats);
      await pass(b.clock, 1_000);
      assert.deepEqual(discovery.health(), { healthy: true });
      await lease.put("v1/a", 2);
    }),
  );

  it(
    "a full disk refuses a put, and keeps the lease and what it held before",
    linuxOnly,
    bench(async (b) => {
      const discovery = b.open();
      const lease = await discovery.openLease({ ttlMs: 4_000 });
      await lease.put("v1/a", 1);
      await rm(join(b.root, "changes"));
      await symlink("/dev/full", join(b.root, "changes"));
      await assert.rejects(lease.put("v1/b", 2), (error: unknown) => {
        assert.ok(error instanceof DynamoError);
        assert.equal(error.reason, "discovery-unavailable");
        assert.match(error.diagnostic ?? "", /ENOSPC/);
        return true;
      });
      await pass(b.clock, 5_000);
      assert.equal(valuesOf(await b.open().list(""))["v1/a"], 1);
    }),
  );
});

describe("file discovery: the folder", () => {
  it(
    "is made for its owner alone: folders 0700, files 0600",
    bench(async (b) => {
      const lease = await b.open().openLease();
      await lease.put("v1/a", 1);
      const modeOf = async (...path: string[]): Promise<number> => (await stat(join(b.root, ...path))).mode & 0o777;
      for (const path of [[], ["beats"], ["leases"], ["closed"], ["leases", lease.id]])
        assert.equal(await modeOf(...path), 0o700);
      assert.equal(await modeOf("changes"), 0o600);
      for (const name of await readdir(b.leasePath(lease.id)))
        assert.equal(await modeOf("leases", lease.id, name), 0o600);
    }),
  );

  it(
    "is refused when everybody may write to it",
    bench(async (b) => {
      await mkdir(b.root);
      await chmod(b.root, 0o777);
      await assert.rejects(b.open().openLease(), rejectsWith("invalid-config"));
      await assert.rejects(b.open().list(""), rejectsWith("invalid-config"));
      assert.deepEqual(await readdir(b.root), []);
    }),
  );

  it(
    "holds no temporary, replaced or superseded file after any number of puts",
    bench(async (b) => {
      const holderClock = new ManualClock();
      const [lease, other] = [await b.open(holderClock).openLease(), await b.open().openLease()];
      for (let i = 0; i < 20; i++) {
        await lease.put("v1/a", i);
        await other.put("v1/a", i);
      }
      await pass(holderClock, 2_500);
      assert.deepEqual(await readdir(b.leasePath(lease.id)), ["lease"]);
      assert.equal((await readdir(b.leasePath(other.id))).length, 2);
    }),
  );

  it(
    "keeps its change log short over a long life, and its watchers miss nothing when it starts over",
    bench(async (b) => {
      const lease = await b.open().openLease();
      const seen = new ChangeRecorder();
      await b.openInRealTime().watch("", seen.listener);
      await writeFile(join(b.root, "changes"), "0123456789abcdef\n".repeat(3_855));
      for (let i: JsonValue = 0; i < 4; i++) {
        await lease.put("v1/a", i);
        await seen.becomes({ "v1/a": i });
      }
      assert.ok((await stat(join(b.root, "changes"))).size < 200);
    }),
  );

  it(
    "no timer and no file is left behind by who closes",
    bench(async (b) => {
      const discovery = b.open();
      const lease = await discovery.openLease();
      await lease.put("v1/a", 1);
      await discovery.watch("", () => undefined);
      await discovery.close();
      assert.equal(b.clock.pendingTimerCount, 0);
      assert.deepEqual(await readdir(join(b.root, "leases")), []);
      assert.deepEqual(await readdir(join(b.root, "beats")), []);
      assert.deepEqual(await readdir(join(b.root, "closed", lease.id)), []);
    }),
  );
});
