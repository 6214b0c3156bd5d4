import { fork } from "node:child_process";
import { once } from "node:events";
import { MapDirectory, ZmqEventPlane, type PublisherRecord } from "../src/runtime/event-plane/index.ts";
import { loadZmq } from "../src/runtime/event-plane/zmq-context.ts";
import { paired, table } from "./harness.ts";

/**
 * Events from one process to another over `zmq`, beside the same library used bare with the same four frames: what
 * sequence tracking, rings and routing add. CPU time per event is this process's own, publisher and subscriber apart.
 */
const EVENT_COUNT = 30_000;
/** Sent per turn, below what the sockets hold, so that nothing is dropped on either side. */
const BATCH_COUNT = 500;
const PAYLOAD_BYTES = 200;

interface Round {
  /** CPU microseconds of this process per event. */
  cpuUs: number;
  /** Events received, which must be all. */
  received: number;
}

/** Our subscriber here, our publisher in a child. */
async function ours(): Promise<Round> {
  const child = fork(import.meta.filename, ["publish-ours"]);
  const directory = new MapDirectory();
  const plane = new ZmqEventPlane({ directory });
  try {
    const all = Promise.withResolvers<void>();
    let received = 0;
    const subscription = await plane.subscribe("kv", {
      onEvent: () => {
        if (++received === EVENT_COUNT) all.resolve();
      },
      onGap: (_id, from, to) => all.reject(new Error(`events ${from} to ${to} were lost`)),
    });
    const [record] = (await once(child, "message")) as [PublisherRecord];
    directory.put("kv", record);
    const before = process.cpuUsage();
    child.send("go");
    await all.promise;
    const { user, system } = process.cpuUsage(before);
    await subscription.close();
    return { cpuUs: (user + system) / EVENT_COUNT, received };
  } finally {
    await plane.close();
    child.kill();
    await once(child, "exit");
  }
}

/** The library's SUB here, its PUB in a child. */
async function bare(): Promise<Round> {
  const zmq = await loadZmq();
  const child = fork(import.meta.filename, ["publish-bare"]);
  const socket = new zmq.library.Subscriber({ context: zmq.context, linger: 0, receiveHighWaterMark: 100_000 });
  try {
    const [address] = (await once(child, "message")) as [string];
    socket.subscribe("kv");
    socket.connect(address);
    let received = 0;
    let before = process.cpuUsage();
    while (received < EVENT_COUNT) {
      const [, , sequence] = await socket.receive();
      // Sequence 0 is sent until it comes through: PUB drops what is sent before the subscription has arrived.
      if (sequence!.readBigUInt64BE() === 0n) {
        if (received === 0) child.send("go");
        before = process.cpuUsage();
      } else received++;
    }
    const { user, system } = process.cpuUsage(before);
    return { cpuUs: (user + system) / EVENT_COUNT, received };
  } finally {
    socket.close();
    child.kill();
    await once(child, "exit");
  }
}

/** Publishes in batches, a turn apart; returns CPU microseconds per event. */
async function publishAll(publish: () => void): Promise<number> {
  const before = process.cpuUsage();
  for (let sent = 0; sent < EVENT_COUNT;) {
    for (let i = 0; i < BATCH_COUNT && sent < EVENT_COUNT; i++, sent++) publish();
    await new Promise<void>((resolve) => setImmediate(resolve));
  }
  const { user, system } = process.cpuUsage(before);
  return (user + system) / EVENT_COUNT;
}

async function publishOurs(): Promise<void> {
  const directory = new MapDirectory();
  await directory.watch("kv", (change) => {
    if (change.type === "put") process.send!(change.record);
  });
  const plane = new ZmqEventPlane({ directory });
  const publisher = await plane.publish("kv", { ringSize: EVENT_COUNT });
  const payload = new Uint8Array(PAYLOAD_BYTES);
  await once(process, "message");
  await publishAll(() => publisher.publish(payload));
}

async function publishBare(): Promise<void> {
  const zmq = await loadZmq();
  const socket = new zmq.library.Publisher({
    context: zmq.context,
    linger: 0,
    sendTimeout: 0,
    sendHighWaterMark: 100_000,
  });
  await socket.bind("tcp://127.0.0.1:*");
  const [topic, id, sequence, payload] = [
    Buffer.from("kv"),
    Buffer.alloc(8),
    Buffer.alloc(8),
    Buffer.alloc(PAYLOAD_BYTES),
  ];
  const timer = setInterval(() => void socket.send([topic, id, sequence, payload]), 5);
  process.send!(socket.lastEndpoint);
  await once(process, "message");
  clearInterval(timer);
  let next = 0;
  await publishAll(() => {
    sequence.writeUInt32BE(++next, 4);
    socket.send([topic, id, sequence, payload]).catch(() => undefined);
  });
}

export async function run(): Promise<void> {
  const { medianA, medianB, ratio, ratioRange } = await paired(
    async () => (await ours()).cpuUs,
    async () => (await bare()).cpuUs,
    { rounds: 5 },
  );
  console.log(`${EVENT_COUNT} events of ${PAYLOAD_BYTES} bytes, one publisher, one subscriber, two processes`);
  console.log(
    table([
      { "CPU us per event": "receive, event plane", median: medianA },
      { "CPU us per event": "receive, bare library", median: medianB },
    ]),
  );
  console.log(
    `event plane / bare library: ${ratio.toFixed(2)} (${ratioRange.map((value) => value.toFixed(2)).join(" to ")})`,
  );
}

if (process.argv[2]?.startsWith("publish-")) {
  // Sockets alone do not keep a process running, and it must outlive what it has sent.
  process.on("message", () => undefined);
  await (process.argv[2] === "publish-ours" ? publishOurs() : publishBare());
} else if (import.meta.main) await run();
