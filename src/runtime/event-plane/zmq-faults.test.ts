import assert from "node:assert/strict";
import { fork, spawnSync, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import test, { type TestContext } from "node:test";
import { setTimeout as delay } from "node:timers/promises";
import type { Router, XPublisher } from "zeromq";
import { createLogger } from "../../observability/index.ts";
import { ManualClock } from "../../std/index.ts";
import type { PublisherRecord } from "./base.ts";
import { Witness, range, text, until } from "./event-plane.battery.ts";
import { BEACON_DELAYS_MS, REPLAY_DEADLINE_MS } from "./limits.ts";
import { MapDirectory } from "./map-directory.ts";
import { ZmqEventPlane } from "./zmq.ts";
import { loadZmq } from "./zmq-context.ts";
import { decodeReplayRequest, encodeReplayAnswer, idFrame, u64Frame, type ReplayRequest } from "./zmq-frames.ts";

const ID = "00000000000000aa";
const EPOCH_A = "000000000000000a";
const EPOCH_B = "000000000000000b";

/** A publisher made of bare sockets, which sends what a test says, in the frames that README.md names. */
class BarePublisher {
  readonly requests: ReplayRequest[] = [];
  subscriptionCount = 0;
  readonly #events: XPublisher;
  readonly #replay: Router;
  #peer: Buffer | undefined;

  private constructor(events: XPublisher, replay: Router) {
    this.#events = events;
    this.#replay = replay;
    void this.#readSubscriptions();
    void this.#readRequests();
  }

  /** On the addresses of an earlier one, or on free ports. */
  static async open(at?: PublisherRecord): Promise<BarePublisher> {
    const { library, context } = await loadZmq();
    const options = { context, linger: 0, sendTimeout: 0 };
    const events = new library.XPublisher({ ...options, verbosity: "allSubs" });
    const replay = new library.Router(options);
    await bindWhenFree(events, at?.address);
    await bindWhenFree(replay, at?.replayAddress);
    return new BarePublisher(events, replay);
  }

  get record(): PublisherRecord {
    return { publisherId: ID, address: this.#events.lastEndpoint!, replayAddress: this.#replay.lastEndpoint! };
  }

  frames(...frames: (Buffer | string)[]): void {
    this.#events.send(frames).catch(assert.ifError);
  }

  event(sequence: number, payload = `event ${sequence}`): void {
    this.frames("load", idFrame(ID), u64Frame(sequence), Buffer.from(payload));
  }

  beacon(epoch: string, newest: number): void {
    this.frames("\0load", idFrame(ID), u64Frame(newest), idFrame(epoch));
  }

  answer(epoch: string, first: number, newest: number, payloads: readonly string[]): void {
    const { askNumber } = this.requests.at(-1)!;
    const answer = { askNumber, epoch, first, newest, payloads: payloads.map((payload) => Buffer.from(payload)) };
    this.#replay.send([this.#peer!, ...encodeReplayAnswer(answer)]).catch(assert.ifError);
  }

  rawAnswer(...frames: (Buffer | string)[]): void {
    this.#replay.send([this.#peer!, ...frames]).catch(assert.ifError);
  }

  close(): void {
    this.#events.close();
    this.#replay.close();
  }

  async #readSubscriptions(): Promise<void> {
    for await (const [frame] of this.#events) if (frame![0] === 1 && frame![1] === 0) this.subscriptionCount++;
  }

  async #readRequests(): Promise<void> {
    for await (const [peer, ...frames] of this.#replay) {
      this.#peer = peer;
      this.requests.push(decodeReplayRequest(frames)!);
    }
  }
}

/** A closed socket gives its port back a moment later, from the library's own thread. */
async function bindWhenFree(socket: XPublisher | Router, address = "tcp://127.0.0.1:*"): Promise<void> {
  const deadlineMs = performance.now() + 5_000;
  for (;;) {
    try {
      return await socket.bind(address);
    } catch (thrown) {
      if (performance.now() > deadlineMs) throw thrown;
      await delay(1);
    }
  }
}

/** A subscribed plane with a bare publisher announced to it, and the subscription arrived there. */
async function aSubscriber(t: TestContext, options: { replay?: boolean; clock?: ManualClock } = {}) {
  const directory = new MapDirectory();
  const lines: string[] = [];
  const plane = new ZmqEventPlane({
    directory,
    logger: createLogger({ level: "warn", format: "jsonl", write: (line) => lines.push(line) }),
    ...(options.clock === undefined ? {} : { clock: options.clock }),
  });
  const bare = await BarePublisher.open();
  t.after(async () => {
    await plane.close();
    bare.close();
  });
  directory.put("load", bare.record);
  const witness = new Witness();
  await plane.subscribe("load", witness, { replay: options.replay ?? false });
  await until(() => bare.subscriptionCount > 0, "the subscription arrived");
  return { directory, plane, bare, witness, lines };
}

test("zmq event plane: a loss is asked for, newer events wait, and all are delivered in order", async (t) => {
  const { plane, bare, witness } = await aSubscriber(t);
  bare.beacon(EPOCH_A, 0);
  for (const sequence of [1, 2, 5, 6]) bare.event(sequence);
  await until(() => bare.requests.length === 1, "a replay is asked for");
  assert.deepEqual(witness.sequences, [1, 2]);
  const { topic, publisherId, from, to } = bare.requests[0]!;
  assert.deepEqual({ topic, publisherId, from, to }, { topic: "load", publisherId: ID, from: 3, to: 4 });
  bare.event(7);
  bare.answer(EPOCH_A, 4, 7, ["event 4"]);
  await until(() => witness.sequences.includes(7), "the rest came");
  assert.deepEqual(
    witness.calls,
    [1, 2, "gap 3-3", 4, 5, 6, 7].map((call) =>
      typeof call === "number" ? `${ID} ${call} event ${call}` : `${ID} ${call}`,
    ),
  );
  assert.deepEqual([plane.statistics.gaps, plane.statistics.lost, plane.statistics.replaysAsked], [1, 1, 1]);
});

test("zmq event plane: a replay that is not answered is given up after two seconds, and a late answer changes nothing", async (t) => {
  const clock = new ManualClock();
  const { plane, bare, witness, lines } = await aSubscriber(t, { clock });
  bare.beacon(EPOCH_A, 0);
  for (const sequence of [1, 3]) bare.event(sequence);
  await until(() => bare.requests.length === 1, "a replay is asked for");
  clock.advance(REPLAY_DEADLINE_MS - 1);
  assert.deepEqual(witness.gaps, []);
  clock.advance(1);
  assert.deepEqual(witness.gaps, [{ publisherId: ID, from: 2, to: 2 }]);
  assert.deepEqual(witness.sequences, [1, 3]);
  bare.answer(EPOCH_A, 2, 3, ["event 2"]);
  bare.event(4);
  await until(() => witness.sequences.includes(4), "the next event came");
  assert.deepEqual(witness.sequences, [1, 3, 4]);
  assert.equal(plane.statistics.replaysFailed, 1);
  assert.equal(lines.length, 1);
  await plane.close();
  assert.equal(clock.pendingTimerCount, 0);
});

test("zmq event plane: malformed frames are dropped, counted and logged once, and harm nothing", async (t) => {
  const { plane, bare, witness, lines } = await aSubscriber(t);
  bare.beacon(EPOCH_A, 0);
  const malformed = [
    ["load"],
    ["load", idFrame(ID), u64Frame(1)],
    ["load", idFrame(ID), u64Frame(1), "x", "y"],
    ["load", Buffer.alloc(7), u64Frame(1), "x"],
    ["load", idFrame(ID), Buffer.alloc(4), "x"],
    ["load", idFrame(ID), u64Frame(0), "x"],
    ["load", idFrame(ID), Buffer.alloc(8, 0xff), "x"],
    ["\0load", idFrame(ID), Buffer.alloc(8, 0xff), idFrame(EPOCH_A)],
    ["\0load", idFrame(ID)],
  ];
  for (const frames of malformed) bare.frames(...frames);
  // Well-formed, but not ours to hear: another topic with our prefix, a publisher that is not in the directory.
  bare.frames("load.other", idFrame(ID), u64Frame(1), "x");
  bare.frames("load", idFrame("00000000000000ff"), u64Frame(1), "x");
  bare.event(1);
  await until(() => witness.sequences.length === 1, "the good event came");
  assert.equal(plane.statistics.malformed, malformed.length);
  bare.event(3);
  await until(() => bare.requests.length === 1, "a replay is asked for");
  bare.rawAnswer("x");
  bare.rawAnswer(u64Frame(bare.requests[0]!.askNumber), idFrame(EPOCH_A), u64Frame(2), Buffer.alloc(8, 0xff));
  bare.answer(EPOCH_A, 2, 3, ["event 2"]);
  await until(() => witness.sequences.length === 3, "the good answer counts");
  assert.equal(plane.statistics.malformed, malformed.length + 2);
  assert.deepEqual(witness.gaps, []);
  assert.equal(lines.filter((line) => line.includes("malformed")).length, 1);
});

test("zmq event plane: bad records in the directory are left out and logged, good ones beside them work", async (t) => {
  const { directory, plane, bare, witness, lines } = await aSubscriber(t);
  const good = bare.record;
  const bad = [
    { ...good, publisherId: "nonsense" },
    { ...good, publisherId: "00000000000000b1", address: "http://127.0.0.1:1" },
    { ...good, publisherId: "00000000000000b2", address: "tcp://not an address" },
    { ...good, publisherId: "00000000000000b3", address: "tcp://127.0.0.1:99999" },
  ];
  for (const record of bad) directory.put("load", record);
  bare.beacon(EPOCH_A, 0);
  bare.event(1);
  await until(() => witness.sequences.length === 1, "the good one's event came");
  assert.equal(plane.statistics.malformed, bad.length);
  assert.equal(lines.length, bad.length);
});

test("zmq event plane: after a broken connection the library's new one brings back what was missed", async (t) => {
  const { bare, witness } = await aSubscriber(t);
  bare.beacon(EPOCH_A, 0);
  bare.event(1);
  await until(() => witness.sequences.length === 1, "the first event came");
  const { record } = bare;
  bare.close();
  const again = await BarePublisher.open(record);
  t.after(() => again.close());
  await until(() => again.subscriptionCount > 0, "subscribed again");
  again.beacon(EPOCH_A, 3);
  await until(() => again.requests.length === 1, "a replay is asked for");
  again.answer(EPOCH_A, 2, 3, ["event 2", "event 3"]);
  await until(() => witness.sequences.length === 3, "what was missed came");
  assert.deepEqual(witness.gaps, []);
  assert.deepEqual(witness.gone, []);
});

test("zmq event plane: an unreachable publisher shows in health and once in the log, and its return too", async (t) => {
  const clock = new ManualClock();
  const { bare, plane, witness, lines } = await aSubscriber(t, { clock });
  bare.beacon(EPOCH_A, 0);
  assert.deepEqual(plane.health(), { healthy: true });
  const { record } = bare;
  bare.close();
  await until(() => clock.pendingTimerCount === 1, "the broken connection was noticed");
  assert.deepEqual(plane.health(), { healthy: true }, "a moment is no fault");
  clock.advance(60_000);
  assert.deepEqual(plane.health(), { healthy: false, detail: "1 of 1 publishing processes unreachable" });
  assert.equal(lines.filter((line) => line.includes("last known")).length, 1, "one line");
  const again = await BarePublisher.open(record);
  t.after(() => again.close());
  await until(() => plane.health().healthy, "the publisher to be reached again");
  await until(() => again.subscriptionCount > 0, "subscribed again");
  again.beacon(EPOCH_A, 1);
  await until(() => again.requests.length === 1, "a replay is asked for");
  again.answer(EPOCH_A, 1, 1, ["event 1"]);
  await until(() => witness.sequences.length === 1, "what was missed came");
  assert.equal(clock.pendingTimerCount, 0);
});

test("zmq event plane: another publisher under the same id and address is noticed by its epoch and followed from 1", async (t) => {
  const { bare, witness } = await aSubscriber(t);
  bare.beacon(EPOCH_A, 0);
  for (const sequence of [1, 2, 3]) bare.event(sequence);
  await until(() => witness.sequences.length === 3, "the first one's events came");
  const seen = bare.subscriptionCount;
  bare.event(1, "again 1");
  await until(() => bare.subscriptionCount > seen, "a beacon is asked for");
  bare.beacon(EPOCH_B, 1);
  await until(() => bare.requests.length === 1, "its first event is asked for");
  bare.answer(EPOCH_B, 1, 1, ["again 1"]);
  bare.event(2, "again 2");
  await until(() => witness.sequences.length === 5, "its events came");
  assert.deepEqual(witness.calls.slice(3), [`${ID} gone`, `${ID} 1 again 1`, `${ID} 2 again 2`]);
});

test("zmq event plane: a duplicate is dropped, and the same epoch in the beacon settles the doubt", async (t) => {
  const { plane, bare, witness } = await aSubscriber(t);
  bare.beacon(EPOCH_A, 0);
  for (const sequence of [1, 2, 1, 2]) bare.event(sequence);
  bare.beacon(EPOCH_A, 2);
  bare.event(3);
  await until(() => witness.sequences.includes(3) && bare.subscriptionCount > 1, "the next one came");
  bare.event(4);
  await until(() => witness.sequences.includes(4), "the one after it came");
  assert.deepEqual(witness.sequences, [1, 2, 3, 4]);
  assert.equal(bare.subscriptionCount, 2, "one beacon is asked for, however many duplicates come");
  await plane.close();
  assert.equal(plane.statistics.duplicates, 2);
});

test("zmq event plane: what full sockets dropped becomes a gap, and the last event comes without another one", async (t) => {
  const directory = new MapDirectory();
  const publishing = new ZmqEventPlane({ directory, queueEvents: 20 });
  const subscribing = new ZmqEventPlane({ directory, queueEvents: 20 });
  t.after(() => Promise.all([publishing.close(), subscribing.close()]));
  const witness = new Witness();
  await subscribing.subscribe("load", witness);
  const publisher = await publishing.publish("load", { ringSize: 10 });
  publisher.publish(text("x"));
  await until(() => witness.sequences.length === 1, "the subscription stands");
  // 50 MB in one turn: more than the sockets of both sides and the kernel between them take.
  const large = new Uint8Array(100_000);
  for (let i = 0; i < 500; i++) publisher.publish(large);
  await until(() => witness.sequences.at(-1) === 501, "the last event came");
  assert.equal(witness.gaps.length > 0, true);
  const lost = witness.gaps.flatMap(({ from, to }) => range(from, to));
  assert.deepEqual(
    [...lost, ...witness.sequences].toSorted((a, b) => a - b),
    range(1, 501),
  );
  assert.deepEqual(witness.sequences.slice(-10), range(492, 501), "the ring came back whole");
});

test("zmq event plane: a publisher repeats its newest sequence a few times after its last event, then rests", async () => {
  const clock = new ManualClock();
  const plane = new ZmqEventPlane({ directory: new MapDirectory(), clock });
  const publisher = await plane.publish("load");
  publisher.publish(text("x"));
  assert.equal(clock.pendingTimerCount, 1);
  clock.advance(BEACON_DELAYS_MS.at(-1)! + 1);
  assert.equal(clock.pendingTimerCount, 0);
  await plane.close();
});

/** Forks a publishing process and puts its record into the directory when it has announced itself. */
async function aPublisherProcess(directory: MapDirectory, publisherId: string, ringSize = 1024) {
  const child = fork(`${import.meta.dirname}/publisher-process.fixture.ts`, ["load", publisherId, String(ringSize)]);
  const [{ record }] = (await once(child, "message")) as [{ record: PublisherRecord }];
  directory.put("load", record);
  const publish = async (count: number): Promise<number> => {
    child.send(count);
    const [{ sequence }] = (await once(child, "message")) as [{ sequence: number }];
    return sequence;
  };
  return { child, publish };
}

async function kill(child: ChildProcess): Promise<void> {
  const exited = once(child, "exit");
  child.kill("SIGKILL");
  await exited;
}

test(
  "zmq event plane: between processes, a killed publisher is reported gone and its successor followed from 1",
  { timeout: 30_000 },
  async () => {
    const directory = new MapDirectory();
    const plane = new ZmqEventPlane({ directory });
    const witness = new Witness();
    await plane.subscribe("load", witness);
    const first = await aPublisherProcess(directory, ID);
    const bystander = await aPublisherProcess(directory, "00000000000000bb");
    try {
      assert.equal(await first.publish(1000), 1000);
      await until(() => witness.calls.length === 1000, "the first one's events came");
      await kill(first.child);
      const second = await aPublisherProcess(directory, ID);
      await second.publish(10);
      await until(() => witness.calls.length === 1011, "the successor's events came");
      assert.deepEqual(witness.calls.slice(1000), [
        `${ID} gone`,
        ...range(1, 10).map((sequence) => `${ID} ${sequence} ${second.child.pid}`),
      ]);
      await kill(second.child);
      directory.delete("load", ID);
      assert.deepEqual(witness.gone, [ID, ID]);
      await bystander.publish(3);
      await until(() => witness.sequences.length === 1013, "the bystander's events came");
      assert.deepEqual(witness.gaps, []);
    } finally {
      await kill(bystander.child);
      await plane.close();
    }
  },
);

test(
  "zmq event plane: between processes, a late joiner gets the ring of a publisher that is silent",
  { timeout: 30_000 },
  async () => {
    const directory = new MapDirectory();
    const { child, publish } = await aPublisherProcess(directory, ID, 600);
    const plane = new ZmqEventPlane({ directory });
    try {
      await publish(1000);
      const witness = new Witness();
      await plane.subscribe("load", witness, { replay: true });
      await until(() => witness.sequences.length === 600, "the ring came");
      assert.deepEqual(witness.sequences, range(401, 1000));
      assert.deepEqual(witness.gaps, []);
    } finally {
      await plane.close();
      await kill(child);
    }
  },
);

test("zmq event plane: a process whose planes are closed ends by itself, and one that forgot to close is not held up", () => {
  const script = (body: string) =>
    spawnSync(
      process.execPath,
      [
        "--input-type=module",
        "--eval",
        `const { ZmqEventPlane, MapDirectory } = await import(${JSON.stringify(import.meta.resolve("./index.ts"))});
         const plane = new ZmqEventPlane({ directory: new MapDirectory() });
         await plane.subscribe("load", { onEvent() {}, onGap() {} });
         const publisher = await plane.publish("load");
         publisher.publish(new Uint8Array(100));
         ${body}`,
      ],
      { encoding: "utf8", timeout: 10_000 },
    );
  for (const body of ["await plane.close();", "process.exit(0);"]) {
    const { status, stderr, error } = script(body);
    assert.equal(error, undefined);
    assert.equal(status, 0, stderr);
  }
});

test("zmq event plane: importing the folder does not load the native library", () => {
  const { stdout } = spawnSync(
    process.execPath,
    [
      "--input-type=module",
      "--eval",
      `await import(${JSON.stringify(import.meta.resolve("./index.ts"))});
       console.log(process.report.getReport().sharedObjects.filter((file) => file.includes("zeromq")).length);`,
    ],
    { encoding: "utf8", timeout: 10_000 },
  );
  assert.equal(stdout.trim(), "0");
});
