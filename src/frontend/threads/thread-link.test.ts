import assert from "node:assert/strict";
import { test } from "node:test";
import { MessageChannel, type MessagePort } from "node:worker_threads";
import { Metrics, silentLogger } from "../../observability/index.ts";
import type { Planes } from "../../runtime/component/index.ts";
import { MemoryDiscovery, MemoryStore } from "../../runtime/discovery/index.ts";
import { MemoryEventBus, MemoryEventPlane } from "../../runtime/event-plane/index.ts";
import { MemoryNetwork, MemoryRequestPlane } from "../../runtime/request-plane/index.ts";
import { SeededRandom, systemClock } from "../../std/index.ts";
import { startWorker } from "../../worker/index.ts";
import { DEFAULT_LIMITS } from "../config.ts";
import { startFrontend } from "../frontend.ts";
import type { HostMessage, ThreadMessage } from "./messages.ts";
import { ThreadLink } from "./thread-link.ts";

type Received<Type extends ThreadMessage["type"]> = Extract<ThreadMessage, { readonly type: Type }>;

/** The host's end, played by the test. */
class Host {
  readonly #port: MessagePort;
  readonly #messages: ThreadMessage[] = [];
  #wake = (): void => undefined;

  constructor(port: MessagePort) {
    this.#port = port;
    port.on("message", (message: ThreadMessage) => {
      this.#messages.push(message);
      this.#wake();
    });
  }

  tell(message: HostMessage): void {
    this.#port.postMessage(message);
  }

  async next<Type extends ThreadMessage["type"]>(type: Type): Promise<Received<Type>> {
    while (this.#messages.length === 0) {
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    }
    const message = this.#messages.shift()!;
    assert.equal(message.type, type);
    return message as Received<Type>;
  }
}

function aLink(): { link: ThreadLink; host: Host } {
  const { port1, port2 } = new MessageChannel();
  return { link: new ThreadLink(port1, `link-test-${process.pid}`, silentLogger), host: new Host(port2) };
}

test(
  "thread link: questions are bounded, fail when the host gives up, and end with the link",
  { timeout: 10_000 },
  async () => {
    const { link, host } = aLink();
    const asked = Array.from({ length: 256 }, () => link.ask({ type: "metrics" }));
    await assert.rejects(link.ask({ type: "metrics" }), { reason: "too-many-requests" });
    const [first, second] = [await host.next("ask"), await host.next("ask")];
    host.tell({ type: "answers", id: second.id, answers: undefined });
    host.tell({ type: "answers", id: first.id, answers: [{ type: "done" }] });
    await assert.rejects(asked[1]!, { reason: "request-deadline" });
    assert.deepEqual(await asked[0], [{ type: "done" }]);
    const rest = Promise.allSettled(asked.slice(2));
    await link.close();
    for (const { status } of await rest) assert.equal(status, "rejected");
  },
);

test(
  "thread link: a question that fails stays unanswered, and the next one is answered",
  { timeout: 10_000 },
  async () => {
    const { link, host } = aLink();
    link.answer = (question) => {
      if (question.type === "explain") throw new Error("broken");
      return { type: "done" };
    };
    host.tell({ type: "question", id: 1, question: { type: "explain", requestId: "r" } });
    host.tell({ type: "question", id: 2, question: { type: "metrics" } });
    assert.equal((await host.next("answer")).id, 2);
    await link.close();
  },
);

test(
  "frontend thread: thresholds set elsewhere before its model was loaded hold once it is, and it tells its own",
  { timeout: 20_000 },
  async () => {
    const { link, host } = aLink();
    const [store, network, bus] = [new MemoryStore(), new MemoryNetwork(), new MemoryEventBus()];
    const made: Planes[] = [];
    const planes = (): Planes => {
      const clock = systemClock;
      const one: Planes = {
        discovery: new MemoryDiscovery({ store, clock }),
        request: new MemoryRequestPlane({ network, clock }),
        events: new MemoryEventPlane({ bus, clock }),
        clock,
        random: new SeededRandom(1),
        logger: silentLogger,
        metrics: new Metrics(),
      };
      made.push(one);
      return one;
    };
    const never = new AbortController().signal;
    const common = { namespace: "dynamo", drainTimeoutMs: 1_000 };
    const http = { httpHost: "127.0.0.1", httpPort: 0, routerMode: "kv", limits: DEFAULT_LIMITS };
    const withService = { ...common, ...http, routerService: { answerTimeoutMs: 1_000 } };
    await assert.rejects(startFrontend(withService, planes(), never, link), { reason: "invalid-config" });
    const frontend = await startFrontend({ ...common, ...http }, planes(), never, link);
    host.tell({
      type: "question",
      id: 1,
      question: { type: "busy-thresholds", model: "echo", thresholds: { activePrefillTokens: 77 } },
    });
    await host.next("answer");
    const engine = { kind: "echo", contextLength: 512, maxSequences: 4, blockSizeTokens: 16, stepMs: 0 } as const;
    const worker = await startWorker(
      { ...common, component: "backend", engine, modelName: "echo", maxQueuedRequests: 8, systemPort: undefined },
      planes(),
      never,
    );
    const url = `http://127.0.0.1:${frontend.port}/busy_threshold`;
    const thresholds = async (): Promise<unknown[]> =>
      (
        (await (await fetch(url)).json()) as { thresholds: { active_prefill_tokens_threshold: unknown }[] }
      ).thresholds.map((one) => one.active_prefill_tokens_threshold);
    while ((await thresholds()).length === 0);
    assert.deepEqual(await thresholds(), [77]);
    assert.deepEqual(await host.next("served"), { type: "served", model: "echo", isServed: true });
    // Other threads may not have it yet.
    const listed = async (): Promise<number> =>
      ((await (await fetch(new URL("/v1/models", url))).json()) as { data: unknown[] }).data.length;
    assert.equal(await listed(), 0);
    host.tell({ type: "listed", model: "echo", isListed: true });
    while ((await listed()) === 0);
    const body = JSON.stringify({ model: "echo", active_prefill_tokens_threshold: 5 });
    const set = fetch(url, { method: "POST", headers: { "content-type": "application/json" }, body });
    const { id, question } = await host.next("ask");
    assert.deepEqual(question, { type: "busy-thresholds", model: "echo", thresholds: { activePrefillTokens: 5 } });
    host.tell({ type: "answers", id, answers: [{ type: "done" }] });
    assert.equal((await set).status, 200);
    assert.deepEqual(await thresholds(), [5]);
    await worker.stop();
    assert.deepEqual(await host.next("served"), { type: "served", model: "echo", isServed: false });
    assert.equal(await listed(), 0);
    await frontend.stop();
    await link.close();
    for (const { events, request, discovery } of made)
      for (const plane of [events, request, discovery]) await plane.close();
  },
);
