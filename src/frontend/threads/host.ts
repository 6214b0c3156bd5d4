import { createServer } from "node:net";
import { Worker } from "node:worker_threads";
import { DynamoError, errorFromWire, toDynamoError } from "../../errors/index.ts";
import { DEFAULT_ROUTER_CONFIG, findPolicy } from "../../router/index.ts";
import { RoleLifecycle, newInstanceId, type Planes } from "../../runtime/component/index.ts";
import type { TimerHandle } from "../../std/index.ts";
import type { FrontendConfig } from "../config.ts";
import type { RunningFrontend } from "../frontend.ts";
import { listenError } from "../http/index.ts";
import { KvIndexKeeper } from "./kv-index-keeper.ts";
import type { Answer, HostMessage, Question, ThreadMessage } from "./messages.ts";
import type { ThreadSeat } from "./serve-thread.ts";

/**
 * `--frontend-threads N`: N threads serve one HTTP port (the kernel spreads connections over them), one KV index with one
 * writer. This is the host: it serves no HTTP, writes the index that the threads read, passes their questions to each
 * other (a scrape, an explanation, new busy thresholds), and starts and ends them together. A thread that ends by itself
 * fails the role, as a crash would fail a process of one thread.
 *
 * Cost of a request that takes one thread: none here; the host sleeps but for KV events. Sessions and own decisions
 * without events are each thread's own, told to the others with its bookings.
 */
export interface FrontendThreadsOptions {
  readonly threadCount: number;
  /** The module of a thread, which calls `serveFrontendThread`. */
  readonly entry: URL;
  /** Makes the thread's `workerData` from its seat. */
  readonly workerData: (seat: ThreadSeat, index: number) => unknown;
}

/** A scrape of a thread that is busy for longer than this is not worth waiting for. */
const ANSWER_MS = 2_000;
/** From the wish to stop until a thread is ended by force: its HTTP server cuts its connections after one second. */
const LEAVE_MS = 4_000;

interface Member {
  readonly name: string;
  readonly worker: Worker;
  readonly ready: PromiseWithResolvers<number>;
  readonly exited: Promise<void>;
  hasExited: boolean;
}

interface Collecting {
  readonly asker: Member;
  readonly askerId: number;
  readonly waiting: Set<Member>;
  readonly answers: Answer[];
  readonly timer: TimerHandle;
}

/** Throws what `startFrontend` throws. */
export async function startFrontendThreads(
  config: FrontendConfig,
  planes: Planes,
  signal: AbortSignal,
  options: FrontendThreadsOptions,
): Promise<RunningFrontend> {
  const lifecycle = new RoleLifecycle({ logger: planes.logger, clock: planes.clock, cleanupTimeoutMs: 2 * LEAVE_MS });
  try {
    await checkPortFree(config);
    const host = new FrontendThreads(config, planes, options, (error) => lifecycle.fail(error));
    lifecycle.defer("frontend threads", () => host.stop());
    const port = await host.start(lifecycle);
    let drainMs = config.drainTimeoutMs;
    lifecycle.onDrain(() => host.drain(drainMs));
    lifecycle.ready(signal);
    const drain = (timeoutMs: number): Promise<void> => {
      drainMs = timeoutMs;
      return lifecycle.drain(timeoutMs);
    };
    return { ...lifecycle.role(), drain, port };
  } catch (thrown) {
    await lifecycle.stop();
    throw toDynamoError(thrown);
  }
}

class FrontendThreads {
  readonly #config: FrontendConfig;
  readonly #planes: Planes;
  readonly #fail: (error: DynamoError) => void;
  readonly #members: readonly Member[];
  readonly #collecting = new Map<number, Collecting>();
  /** By model, the threads that serve it. Bounded by what each of them serves. */
  readonly #serving = new Map<string, Set<Member>>();
  #questionCount = 0;
  #leaving = false;

  constructor(
    config: FrontendConfig,
    planes: Planes,
    { threadCount, entry, workerData }: FrontendThreadsOptions,
    fail: (error: DynamoError) => void,
  ) {
    this.#config = config;
    this.#planes = planes;
    this.#fail = fail;
    const seat: ThreadSeat = { bookings: `frontend-${newInstanceId()}`, threadCount };
    this.#members = Array.from({ length: threadCount }, (_, index) =>
      this.#spawn(`frontend-${index}`, entry, workerData(seat, index)),
    );
  }

  /** The threads load at the same time; the first chooses the port where there is a choice. */
  async start(lifecycle: RoleLifecycle): Promise<number> {
    const { routerMode, namespace, router } = this.#config;
    const kvEvents = router?.kvEvents ?? DEFAULT_ROUTER_CONFIG.kvEvents;
    const policy = findPolicy(routerMode);
    if (policy === undefined) throw new DynamoError("invalid-config", `there is no router mode ${routerMode}`);
    if (policy.usesOverlap === true && kvEvents) {
      const keeper = new KvIndexKeeper(this.#planes, namespace, (message) => this.#tellAll(message));
      lifecycle.defer("KV index", () => keeper.close());
      await keeper.start();
    }
    const [first, ...others] = this.#members;
    tell(first!, { type: "listen", port: this.#config.httpPort });
    const port = await first!.ready.promise;
    for (const member of others) tell(member, { type: "listen", port });
    await Promise.all(others.map((member) => member.ready.promise));
    return port;
  }

  /** Resolves when all have left. */
  async drain(timeoutMs: number): Promise<void> {
    this.#leaving = true;
    this.#tellAll({ type: "drain", timeoutMs });
    await Promise.all(this.#members.map((member) => member.exited));
  }

  async stop(): Promise<void> {
    this.#leaving = true;
    this.#tellAll({ type: "stop" });
    const force = this.#planes.clock.setTimer(LEAVE_MS, () => {
      for (const { worker, name, hasExited } of this.#members) {
        if (hasExited) continue;
        this.#planes.logger.warn({ thread: name }, "a frontend thread did not leave in time and is ended");
        void worker.terminate();
      }
    });
    await Promise.all(this.#members.map((member) => member.exited));
    force.cancel();
    for (const { timer } of this.#collecting.values()) timer.cancel();
    this.#collecting.clear();
  }

  #tellAll(message: HostMessage): void {
    for (const member of this.#members) tell(member, message);
  }

  #spawn(name: string, entry: URL, workerData: unknown): Member {
    const worker = new Worker(entry, { workerData, name });
    const ready = Promise.withResolvers<number>();
    // Who waits for it is told; when nobody waits yet or any more, `fail` tells.
    ready.promise.catch(() => undefined);
    const exited = Promise.withResolvers<void>();
    const member: Member = { name, worker, ready, exited: exited.promise, hasExited: false };
    worker.on("message", (message: ThreadMessage) => this.#onMessage(member, message));
    // Followed by `exit`.
    worker.on("error", (cause) => this.#onBroken(member, new DynamoError("internal", `${name} failed`, { cause })));
    worker.on("exit", (code) => {
      member.hasExited = true;
      exited.resolve();
      this.#onBroken(member, new DynamoError("internal", `${name} ended by itself with code ${code}`));
      for (const [id, collecting] of this.#collecting) this.#collect(id, collecting, member);
    });
    return member;
  }

  /** The first failure counts: `exit` follows each. */
  #onBroken(member: Member, error: DynamoError): void {
    member.ready.reject(error);
    if (this.#leaving) {
      if (!member.hasExited)
        this.#planes.logger.warn({ err: error, thread: member.name }, "a frontend thread failed while leaving");
      return;
    }
    this.#fail(error);
  }

  #onMessage(member: Member, message: ThreadMessage): void {
    switch (message.type) {
      case "ready":
        member.ready.resolve(message.port);
        return;
      case "failed":
        this.#onBroken(member, errorFromWire(message.reason, message.message, message.diagnostic ?? ""));
        return;
      case "served":
        this.#onServed(member, message.model, message.isServed);
        return;
      case "ask":
        this.#ask(member, message.id, message.question).catch((cause: unknown) => {
          this.#planes.logger.error(
            { err: cause, question: message.question.type },
            "a frontend thread's question failed",
          );
          tell(member, { type: "answers", id: message.id, answers: undefined });
        });
        return;
      case "answer": {
        const collecting = this.#collecting.get(message.id);
        if (collecting !== undefined) this.#collect(message.id, collecting, member, message.answer);
      }
    }
  }

  /** A model is listed from when its last thread serves it until its first one does not. */
  #onServed(member: Member, model: string, isServed: boolean): void {
    const serving = this.#serving.get(model) ?? new Set();
    const wasListed = serving.size === this.#members.length;
    if (isServed) serving.add(member);
    else serving.delete(member);
    if (serving.size > 0) this.#serving.set(model, serving);
    else this.#serving.delete(model);
    const isListed = serving.size === this.#members.length;
    if (isListed !== wasListed) this.#tellAll({ type: "listed", model, isListed });
  }

  /** Passes a question on to all others; the host itself has its metrics to add. */
  async #ask(asker: Member, askerId: number, question: Question): Promise<void> {
    const answers: Answer[] = [];
    if (question.type === "metrics") answers.push({ type: "metrics", snapshot: await this.#planes.metrics.snapshot() });
    const waiting = new Set(this.#members.filter((member) => member !== asker && !member.hasExited));
    const id = this.#questionCount++;
    const timer = this.#planes.clock.setTimer(ANSWER_MS, () => {
      this.#collecting.delete(id);
      tell(asker, { type: "answers", id: askerId, answers: undefined });
    });
    const collecting: Collecting = { asker, askerId, waiting, answers, timer };
    this.#collecting.set(id, collecting);
    for (const member of waiting) tell(member, { type: "question", id, question });
    if (waiting.size === 0) this.#collect(id, collecting, asker);
  }

  #collect(id: number, { asker, askerId, waiting, answers, timer }: Collecting, member: Member, answer?: Answer): void {
    waiting.delete(member);
    if (answer !== undefined) answers.push(answer);
    if (waiting.size > 0) return;
    timer.cancel();
    this.#collecting.delete(id);
    tell(asker, { type: "answers", id: askerId, answers });
  }
}

function tell({ worker, hasExited }: Member, message: HostMessage): void {
  if (!hasExited) worker.postMessage(message);
}

/**
 * Sockets that share a port share it with every process of the user that does the same: a second frontend on the port
 * would take half of the first one's clients. So the port must be free for one that does not share.
 */
function checkPortFree({ httpHost, httpPort }: FrontendConfig): Promise<void> {
  if (httpPort === 0) return Promise.resolve();
  return new Promise((resolve, reject) => {
    const server = createServer();
    server.once("error", (cause: NodeJS.ErrnoException) => reject(listenError(httpHost, httpPort, cause)));
    server.listen(httpPort, httpHost, () => server.close(() => resolve()));
  });
}
