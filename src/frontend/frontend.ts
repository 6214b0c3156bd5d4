import { monitorEventLoopDelay } from "node:perf_hooks";
import { DynamoError, toDynamoError } from "../errors/index.ts";
import { renderMerged } from "../observability/index.ts";
import { packageVersion, systemClock } from "../std/index.ts";
import { RoleLifecycle, formatDynAddress, type Planes, type RunningRole } from "../runtime/component/index.ts";
import type { FrontendConfig } from "./config.ts";
import { disaggApi } from "./disagg-api.ts";
import { HttpServer, type Exchange, type Route } from "./http/index.ts";
import { KEPT } from "./kept-workers.ts";
import { ModelRegistry } from "./model-registry.ts";
import { openApiRoute } from "./openai/index.ts";
import { Operators } from "./operator.ts";
import { Pipeline } from "./pipeline.ts";
import { requestsApi } from "./requests-api.ts";
import { routeApi } from "./route-api.ts";
import { answerQuestion } from "./threads/answer-question.ts";
import type { ThreadLink } from "./threads/thread-link.ts";

export interface RunningFrontend extends RunningRole {
  /** The port it listens on; differs from the configured one when that was 0. */
  readonly port: number;
}

/** One frontend on its own loop, with what it serves and what runs there: for whoever checks on it from outside. */
export interface RunningFrontendLoop extends RunningFrontend {
  readonly models: ModelRegistry;
  readonly pipeline: Pipeline;
}

/**
 * How long a start waits for the models of the workers that are there. A fetch of a tokenizer takes a tenth of a second; of
 * a frozen worker, three until it is given up and the next one is asked.
 */
const FIRST_MODELS_MS = 15_000;

/**
 * The frontend role: the OpenAI API over HTTP in front of whatever workers discovery knows. Listens once it knows the
 * models of those; another model appears when its first worker has joined. Throws `address-in-use`, `discovery-unavailable`. `thread` is given
 * when it is one of several threads that serve the port together (threads/host.ts).
 */
export async function startFrontend(
  config: FrontendConfig,
  planes: Planes,
  signal: AbortSignal,
  thread?: ThreadLink,
): Promise<RunningFrontendLoop> {
  const lifecycle = new RoleLifecycle({ logger: planes.logger, clock: planes.clock });
  try {
    const models = new ModelRegistry(planes, {
      namespace: config.namespace,
      routerMode: config.routerMode,
      router: config.router,
      replicaSync: config.routerReplicaSync,
      thread,
      service: config.routerService,
      migration: config.migration,
      stallLimitMs: config.stallLimitMs,
      disagg: config.disagg,
      handoffTimeoutMs: config.handoffTimeoutMs,
      decodeWaitMs: config.decodeWaitMs,
      tokenizerCacheBytes: config.limits.tokenizerCacheBytes,
      limits: config.limits,
    });
    const operators = new Operators(config.adminKey);
    const pipeline = new Pipeline(planes, config, models, operators);
    const { live } = pipeline;
    if (thread !== undefined) {
      thread.answer = (question) => answerQuestion(question, { models, live, metrics: planes.metrics });
    }
    let draining = false;
    const server = new HttpServer({
      host: config.httpHost,
      port: config.httpPort,
      reusePort: thread !== undefined,
      limits: config.limits,
      routes: routes({ config, planes, models, operators, pipeline, thread, isDraining: () => draining }),
      logger: planes.logger,
      clock: planes.clock,
      metrics: planes.metrics,
      network: planes.http,
    });
    // Cleanups run last deferred first: the server, whose requests need the models, closes before they do.
    lifecycle.defer("model registry", () => models.close());
    await models.start();
    await models.loaded(FIRST_MODELS_MS);
    const { port } = await server.listen();
    lifecycle.defer("http server", () => server.close({ graceMs: 1_000 }));
    // Under virtual time the loop has no delay of its own.
    if (planes.clock === systemClock) lifecycle.defer("event loop monitor", watchEventLoop(planes));
    lifecycle.onDrain(async () => {
      draining = true;
      pipeline.beginDrain();
      const linger = server.linger(config.lingerMs ?? LINGER_MS);
      await live.idle();
      await linger;
    });
    lifecycle.defer("running requests", () =>
      live.cancelAll(new DynamoError("draining", "the server is shutting down")),
    );
    lifecycle.ready(signal);
    return Object.assign(lifecycle.role(), { port, models, pipeline });
  } catch (thrown) {
    await lifecycle.stop();
    throw toDynamoError(thrown);
  }
}

const LINGER_MS = 500;

interface RouteContext {
  readonly config: FrontendConfig;
  readonly planes: Planes;
  readonly models: ModelRegistry;
  readonly operators: Operators;
  readonly pipeline: Pipeline;
  readonly thread: ThreadLink | undefined;
  readonly isDraining: () => boolean;
}

function routes(context: RouteContext): Route[] {
  const { models, pipeline } = context;
  return [
    {
      method: "POST",
      path: "/v1/chat/completions",
      family: "openai",
      body: "json",
      handle: (exchange) => pipeline.chat(exchange),
    },
    {
      method: "POST",
      path: "/v1/completions",
      family: "openai",
      body: "json",
      handle: (exchange) => pipeline.completions(exchange),
    },
    {
      method: "GET",
      path: "/v1/models",
      family: "openai",
      handle: (exchange) => exchange.json(200, modelList(models)),
    },
    { method: "GET", path: "/v1/models/*", family: "openai", handle: (exchange) => sendModel(exchange, models) },
    { method: "GET", path: "/health", family: "plain", handle: (exchange) => sendHealth(exchange, context) },
    { method: "GET", path: "/live", family: "plain", handle: (exchange) => exchange.json(200, { status: "live" }) },
    {
      method: "GET",
      path: "/metrics",
      family: "plain",
      handle: async (exchange) =>
        exchange.text(200, await scrape(context), {
          "content-type": "text/plain; version=0.0.4; charset=utf-8",
        }),
    },
    {
      method: "POST",
      path: "/v1/route",
      family: "openai",
      body: "json",
      handle: (exchange) => pipeline.previewRoute(exchange),
    },
    ...routeApi(models, context.operators, context.thread),
    ...disaggApi(models, context.operators, context.planes),
    ...requestsApi(pipeline.live, context.operators, context.thread),
    openApiRoute(context.config.limits, packageVersion()),
  ];
}

/** Of the whole process. */
async function scrape({ planes, thread }: RouteContext): Promise<string> {
  if (thread === undefined) return planes.metrics.render();
  const [own, answers] = await Promise.all([planes.metrics.snapshot(), thread.ask({ type: "metrics" })]);
  return renderMerged([own, ...answers.flatMap((answer) => (answer.type === "metrics" ? [answer.snapshot] : []))]);
}

function modelObject(model: ReturnType<ModelRegistry["list"]>[number]): Record<string, unknown> {
  return {
    id: model.name,
    object: "model",
    created: model.card.created,
    owned_by: "dynamo",
    max_model_len: model.card.contextLength,
  };
}

function modelList(models: ModelRegistry): Record<string, unknown> {
  return { object: "list", data: models.listed().map(modelObject) };
}

function sendModel(exchange: Exchange, models: ModelRegistry): void {
  const name = decodeURIComponent(exchange.path.slice("/v1/models/".length));
  const model = models.listed().find((candidate) => candidate.name === name);
  if (model === undefined)
    exchange.sendError(new DynamoError("model-not-found", `The model \`${name}\` does not exist`, { param: "model" }));
  else exchange.json(200, modelObject(model));
}

/** Dynamo's shape: `unhealthy` without workers is still a 200; 503 only while draining. */
function sendHealth(exchange: Exchange, { models, planes, isDraining }: RouteContext): void {
  const instances = models.instances();
  const serving = instances.filter(({ problem }) => problem === undefined);
  const discovery = planes.discovery.health();
  const events = planes.events.health?.() ?? { healthy: true };
  exchange.json(isDraining() ? 503 : 200, {
    status: isDraining() ? "draining" : serving.length > 0 ? "healthy" : "unhealthy",
    endpoints: [...new Set(serving.map(({ instance }) => formatDynAddress(instance)))],
    instances: instances.map(({ instance, problem, isKept }) => ({
      namespace: instance.namespace,
      component: instance.component,
      endpoint: instance.endpoint,
      instance_id: instance.instanceId,
      transport: { address: instance.address },
      ...(problem === undefined ? {} : { problem }),
      ...(isKept ? { degraded: KEPT } : {}),
    })),
    discovery: discovery.healthy ? "ok" : `degraded: ${discovery.detail ?? "unknown"}`,
    events: events.healthy ? "ok" : `degraded: ${events.detail ?? "unknown"}`,
  });
}

/** Event loop delay since the last scrape, as gauges. */
function watchEventLoop(planes: Planes): () => void {
  const delay = monitorEventLoopDelay({ resolution: 20 });
  delay.enable();
  const gauge = planes.metrics.gauge("dynamo_frontend_event_loop_delay_seconds");
  planes.metrics.onCollect(() => {
    gauge.labels("0.5").set(delay.percentile(50) / 1e9);
    gauge.labels("0.99").set(delay.percentile(99) / 1e9);
    gauge.labels("1").set(delay.max / 1e9);
    delay.reset();
  });
  return () => delay.disable();
}
