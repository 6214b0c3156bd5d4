import { startFrontend, DEFAULT_LIMITS, type FrontendConfig, type RunningFrontend } from "../../src/frontend/index.ts";
import { Metrics, silentLogger, type Logger } from "../../src/observability/index.ts";
import type { Planes } from "../../src/runtime/component/index.ts";
import { MemoryDiscovery, MemoryStore } from "../../src/runtime/discovery/index.ts";
import { MemoryEventBus, MemoryEventPlane, type MemoryEventBusOptions } from "../../src/runtime/event-plane/index.ts";
import { MemoryNetwork, MemoryRequestPlane } from "../../src/runtime/request-plane/index.ts";
import { startRouter, type RouterServiceConfig, type RunningRouter } from "../../src/router-service/index.ts";
import { systemClock, SeededRandom } from "../../src/std/index.ts";
import { startWorker, type RunningWorker, type WorkerConfig, type WorkerParts } from "../../src/worker/index.ts";

export interface InProcessCluster {
  readonly baseUrl: string;
  readonly frontend: RunningFrontend;
  readonly frontendPlanes: Planes;
  readonly workers: RunningWorker[];
  addWorker(overrides?: Partial<WorkerConfig>, parts?: WorkerParts): Promise<RunningWorker>;
  /** One more frontend on the same planes, as the first one but for `overrides`. */
  addFrontend(overrides?: InProcessOptions["frontend"]): Promise<InProcessFrontend>;
  /** A router service on the same planes. */
  addRouter(
    overrides?: Partial<RouterServiceConfig>,
  ): Promise<{ readonly router: RunningRouter; readonly planes: Planes }>;
  /** Planes of one more process. */
  planes(): Planes;
  /** A worker's process is gone, without a word: its connections break; discovery knows it until its lease ends. */
  kill(address: string): void;
  /** Of a worker, as discovery knows it. */
  addressOf(instanceId: string): Promise<string>;
  /** Waits until the frontend routes to that many workers. */
  settled(workerCount: number): Promise<void>;
  stop(): Promise<void>;
}

export interface InProcessFrontend {
  readonly baseUrl: string;
  readonly frontend: RunningFrontend;
  readonly planes: Planes;
}

export interface InProcessOptions {
  readonly workers?: number;
  readonly worker?: Partial<WorkerConfig>;
  readonly frontend?: Partial<Omit<FrontendConfig, "limits">> & { limits?: Partial<FrontendConfig["limits"]> };
  readonly logger?: Logger;
  /** Loses what it says of the event plane. */
  readonly drop?: MemoryEventBusOptions["drop"];
}

export const ECHO: WorkerConfig["engine"] = {
  kind: "echo",
  contextLength: 4096,
  maxSequences: 256,
  blockSizeTokens: 16,
  stepMs: 0,
};

/** A whole cluster in this process on memory planes, with the echo engine unless told otherwise: what most tests need. */
export async function startInProcessCluster(options: InProcessOptions = {}): Promise<InProcessCluster> {
  const store = new MemoryStore();
  const network = new MemoryNetwork();
  const bus = new MemoryEventBus(options.drop === undefined ? {} : { drop: options.drop });
  const logger = options.logger ?? silentLogger;
  // One for all: ids are drawn from it.
  const random = new SeededRandom(1);
  const opened: Planes[] = [];
  const planes = (): Planes => {
    const clock = systemClock;
    const made: Planes = {
      discovery: new MemoryDiscovery({ store, clock }),
      request: new MemoryRequestPlane({ network, clock }),
      events: new MemoryEventPlane({ bus, clock }),
      clock,
      random,
      logger,
      metrics: new Metrics(),
    };
    opened.push(made);
    return made;
  };
  const never = new AbortController().signal;
  const frontends: RunningFrontend[] = [];
  const addFrontend = async (overrides: InProcessOptions["frontend"] = {}): Promise<InProcessFrontend> => {
    const made = planes();
    const given = { ...options.frontend, ...overrides };
    const frontend = await startFrontend(
      {
        namespace: "dynamo",
        httpHost: "127.0.0.1",
        httpPort: 0,
        routerMode: "round-robin",
        drainTimeoutMs: 5_000,
        ...given,
        limits: { ...DEFAULT_LIMITS, ...given.limits },
      },
      made,
      never,
    );
    frontends.push(frontend);
    return { baseUrl: `http://127.0.0.1:${frontend.port}`, frontend, planes: made };
  };
  const { baseUrl, frontend, planes: frontendPlanes } = await addFrontend();
  const workers: RunningWorker[] = [];
  const addWorker = async (overrides: Partial<WorkerConfig> = {}, parts: WorkerParts = {}): Promise<RunningWorker> => {
    const worker = await startWorker(
      {
        namespace: "dynamo",
        component: "backend",
        engine: ECHO,
        modelName: "echo",
        maxQueuedRequests: 1_024,
        drainTimeoutMs: 5_000,
        systemPort: undefined,
        ...options.worker,
        ...overrides,
      },
      planes(),
      never,
      parts,
    );
    workers.push(worker);
    return worker;
  };
  const routers: RunningRouter[] = [];
  const addRouter: InProcessCluster["addRouter"] = async (overrides = {}) => {
    const made = planes();
    const config = { namespace: "dynamo", routerMode: "round-robin", systemPort: undefined, ...overrides };
    const router = await startRouter(config, made, never);
    routers.push(router);
    return { router, planes: made };
  };
  const health = async (): Promise<Health> => (await (await fetch(`${baseUrl}/health`)).json()) as Health;
  const settled = (workerCount: number): Promise<void> => workersJoined(baseUrl, workerCount);
  for (let i = 0; i < (options.workers ?? 1); i++) await addWorker();
  await settled(options.workers ?? 1);
  return {
    baseUrl,
    frontend,
    frontendPlanes,
    workers,
    addWorker,
    addFrontend,
    addRouter,
    planes,
    kill: (address) => network.kill(address),
    async addressOf(instanceId) {
      const found = (await health()).instances.find((instance) => instance.instance_id === instanceId);
      if (found === undefined) throw new Error(`no worker ${instanceId}`);
      return found.transport.address;
    },
    settled,
    async stop() {
      await Promise.all(frontends.map((each) => each.stop()));
      await Promise.all(routers.map((router) => router.stop()));
      await Promise.all(workers.map((worker) => worker.stop()));
      for (const made of opened) {
        await made.events.close();
        await made.request.close();
        await made.discovery.close();
      }
    },
  };
}

interface Health {
  readonly instances: { readonly problem?: string; instance_id: string; transport: { address: string } }[];
}

/** Waits until the frontend at `baseUrl` routes to `count` workers. */
export async function workersJoined(baseUrl: string, count: number, timeoutMs?: number): Promise<void> {
  await until(
    async () => {
      const health = (await (await fetch(`${baseUrl}/health`)).json()) as { instances: { problem?: string }[] };
      return health.instances.filter((instance) => instance.problem === undefined).length === count;
    },
    `${count} workers to join`,
    timeoutMs,
  );
}

/** Polls `condition` each 10 ms until it holds; fails after `timeoutMs` with what it waited for. */
export async function until(
  condition: () => boolean | Promise<boolean>,
  what: string,
  timeoutMs = 15_000,
): Promise<void> {
  const deadlineMs = performance.now() + timeoutMs;
  while (!(await condition())) {
    if (performance.now() > deadlineMs) throw new Error(`waited ${timeoutMs} ms for ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
}
