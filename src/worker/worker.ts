import { hostname } from "node:os";
import { loadEngine, type Engine, type EngineInfo, type EngineSink, type EngineTransfer } from "../engines/index.ts";
import { DynamoError, toDynamoError } from "../errors/index.ts";
import { startSystemServer } from "../observability/index.ts";
import {
  CLEAR_BLOCKS_ENDPOINT,
  GENERATE_ENDPOINT,
  EARLY_PULL_ENDPOINT,
  HANDOFF_ENDPOINT,
  KV_EVENTS_TOPIC,
  LOAD_TOPIC,
  TRANSFERS_TOPIC,
  ROLE_ENDPOINT,
  TOKENIZER_ENDPOINT,
  kvFingerprint,
  type LoadSnapshot,
  type ModelCard,
  type WorkerRole,
} from "../protocol/index.ts";
import {
  PlaneHealth,
  RoleLifecycle,
  cardKey,
  formatEndpoint,
  instanceKey,
  newInstanceId,
  openLastingLease,
  registerCard,
  registerInstance,
  type Instance,
  type Planes,
  type RunningRole,
} from "../runtime/component/index.ts";
import type { EndpointHandler } from "../runtime/request-plane/index.ts";
import { runCanary } from "./canary.ts";
import { checkRole, sequencesThatFit } from "./check-pair.ts";
import type { WorkerConfig } from "./config.ts";
import { EngineAbsence } from "./engine-absence.ts";
import { EngineHandoffs } from "./engine-handoffs.ts";
import { watchEngine } from "./engine-watch.ts";
import { DEFAULT_HANDOFF, WorkerHandoffs } from "./handoffs.ts";
import { KvPublisher } from "./kv-publisher/index.ts";
import { publishLoad } from "./publish-load.ts";
import { publishTransfers } from "./publish-transfers.ts";
import { RoleSwitch } from "./role-switch.ts";
import { serveBytes } from "./serve-bytes.ts";
import { GenerateService } from "./serve-generate.ts";
import { loadServedTokenizer, type ServedTokenizer } from "./served-tokenizer.ts";
import { modelFingerprint } from "./tiers/model-fingerprint.ts";
import { withTiers } from "./tiers/index.ts";
import { WorkerMetrics } from "./worker-metrics.ts";

export interface RunningWorker extends RunningRole {
  /** 16 hex digits. */
  readonly instanceId: string;
  /** Where `/health` and `/metrics` answer; undefined when none was asked for. */
  readonly systemPort: number | undefined;
  /** The engine's newest load. */
  load(): LoadSnapshot;
  readonly role: WorkerRole;
  /** Its end of handoffs, once it has, or had, a part in disaggregated serving; for tests and the simulator. */
  readonly handoffs: WorkerHandoffs | undefined;
  /** The same where its engine moves the blocks itself. */
  readonly engineHandoffs: EngineHandoffs | undefined;
  /** What its engine tells of itself. */
  describe(): Readonly<Record<string, unknown>>;
}

/** What a worker makes by itself unless it is given. */
export interface WorkerParts {
  /** Of workers that share one. @default read from the engine's model */
  readonly tokenizer?: ServedTokenizer;
  /** For engines that come from elsewhere, such as the simulator's, which fail when told. @default loadEngine */
  readonly makeEngine?: typeof loadEngine;
}

/** Long enough for a cold engine's first step on a busy machine. */
const CANARY_TIMEOUT_MS = 60_000;
const ENGINE_STALL_MS = 60_000;
/** Of an engine without work, before it is asked for a sign of life. */
const IDLE_CANARY_MS = 60_000;

/**
 * The worker role: starts its engine, proves with a canary over its own request plane that it answers, and only then
 * registers. Serves until drained (unregister, finish, leave) or until its engine dies, which rejects `done`.
 */
export async function startWorker(
  config: WorkerConfig,
  planes: Planes,
  signal: AbortSignal,
  parts: WorkerParts = {},
): Promise<RunningWorker> {
  const lifecycle = new RoleLifecycle({ logger: planes.logger, clock: planes.clock });
  try {
    return await start(config, planes, signal, lifecycle, parts);
  } catch (thrown) {
    await lifecycle.stop();
    throw toDynamoError(thrown);
  }
}

async function start(
  config: WorkerConfig,
  planes: Planes,
  signal: AbortSignal,
  lifecycle: RoleLifecycle,
  parts: WorkerParts,
): Promise<RunningWorker> {
  const { clock, logger, discovery } = planes;
  const startMs = clock.monotonicMs();
  const instanceId = newInstanceId(planes.random);
  const address = (endpoint: string): string =>
    formatEndpoint({ namespace: config.namespace, component: config.component, endpoint });
  const labels = [config.namespace, config.component, GENERATE_ENDPOINT, instanceId, config.modelName] as const;
  const metrics = new WorkerMetrics(planes.metrics, labels);

  const planeHealth = new PlaneHealth(planes);
  const server = await planes.request.listen();
  lifecycle.defer("request plane server", () => server.close());
  const bare = await (parts.makeEngine ?? loadEngine)(config.engine, { logger, clock });
  const tiered =
    config.kvTiers === undefined
      ? undefined
      : withTiers({
          engine: bare,
          modelPath: config.engine.modelPath,
          config: config.kvTiers,
          metrics: planes.metrics,
          clock,
          logger,
        });
  const engine = tiered?.engine ?? bare;
  lifecycle.defer("engine", () => engine.stop());
  const service = new GenerateService({
    engine,
    server,
    metrics,
    clock,
    logger,
    tracing: planes.tracing,
  });
  const publisher = await planes.events.publish(KV_EVENTS_TOPIC, { publisherId: instanceId });
  lifecycle.defer("KV event publisher", () => publisher.close());
  const kvEvents = new KvPublisher({
    publisher,
    clock,
    random: planes.random,
    logger,
    dropped: metrics.droppedKvEvents,
  });
  lifecycle.defer("KV event log", () => kvEvents.close());
  // What runs at the end of the drain time is handed over: whoever sent it goes on with another worker.
  lifecycle.defer("running requests", () =>
    service.failAll(new DynamoError("draining", "the worker is shutting down")),
  );
  const fail = (error: DynamoError): void => {
    if (lifecycle.state !== "stopped")
      logger.error({ reason: error.reason, diagnostic: error.diagnostic }, error.publicMessage);
    // At once, so that the requests go on elsewhere while this process takes leave.
    service.failAll(error);
    lifecycle.fail(error);
  };
  const absence = new EngineAbsence(fail);
  const sink: EngineSink = {
    onStep: (step) => service.onStep(step),
    onKvEvents: (events) => kvEvents.onKvEvents(events),
    onFatal: (error) => fail(error),
    onUnavailable: (error) => absence.begin(error),
    onAvailable: (now) => absence.end(now),
  };
  const [info, tokenizer] = await Promise.all([
    engine.start(sink, signal),
    parts.tokenizer ?? loadServedTokenizer(config, logger),
  ]);
  metrics.loadTime.set((clock.monotonicMs() - startMs) / 1_000);
  if (engine.processState !== undefined) metrics.followEngine(planes.metrics, labels, engine.processState.bind(engine));
  service.maxStreams =
    (config.maxEngineRequests ?? info.maxSequences * info.dataParallelSize) + config.maxQueuedRequests;
  let card = await modelCard(config, info, tokenizer, clock.wallMs());
  const prepareRole = async (role: WorkerRole): Promise<void> => {
    await checkRole(role, { ...card, role }, info, discovery, config.namespace);
    if (role === "agg") return;
    if (engine.transfer !== undefined) return prepareEngineRole(role, engine.transfer);
    if (service.handoffs !== undefined) return giveRole(role, service.handoffs, info);
    const handoffs = await WorkerHandoffs.start({
      config: config.handoff ?? DEFAULT_HANDOFF,
      name: `${config.namespace}.${config.component}.${instanceId}`,
      engine,
      client: planes.request.client,
      address: server.address,
      endpoint: address(HANDOFF_ENDPOINT),
      blockBytes: info.blockBytes,
      blockSizeTokens: info.blockSizeTokens,
      fingerprint: kvFingerprint(card),
      clock,
      random: planes.random,
      logger,
      metrics: planes.metrics,
      labels,
    });
    service.handoffs = handoffs;
    lifecycle.defer("handoffs", () => handoffs.close());
    const publisher = await planes.events.publish(TRANSFERS_TOPIC, { publisherId: instanceId, ringSize: 1 });
    lifecycle.defer("transfer publisher", () => publisher.close());
    lifecycle.defer("transfer timer", publishTransfers(publisher, handoffs.agent, instanceId, clock));
    await giveRole(role, handoffs, info);
  };
  /** Its engine moves the blocks itself. */
  const prepareEngineRole = async (role: "prefill" | "decode", transfer: EngineTransfer): Promise<void> => {
    if (!transfer.roles.includes(role)) {
      throw new DynamoError(
        "invalid-config",
        `--disaggregation-mode ${role}: the engine was started for ${transfer.roles.join(" and ")}; start it anew, or with a connector for both (kv_role kv_both)`,
      );
    }
    if (service.engineHandoffs !== undefined) return;
    const { leaseMs, pullTimeoutMs } = config.handoff ?? DEFAULT_HANDOFF;
    const name = `${config.namespace}.${config.component}.${instanceId}`;
    const handoffs = new EngineHandoffs({
      transfer,
      name,
      client: planes.request.client,
      address: server.address,
      endpoint: address(HANDOFF_ENDPOINT),
      fingerprint: kvFingerprint(card),
      blockSizeTokens: info.blockSizeTokens,
      leaseMs,
      timeoutMs: pullTimeoutMs,
      clock,
      random: planes.random,
      logger,
      metrics: planes.metrics,
      labels,
    });
    service.engineHandoffs = handoffs;
    lifecycle.defer("engine handoffs", () => handoffs.close());
    const publisher = await planes.events.publish(TRANSFERS_TOPIC, { publisherId: instanceId, ringSize: 1 });
    lifecycle.defer("transfer publisher", () => publisher.close());
    lifecycle.defer("transfer timer", publishTransfers(publisher, handoffs, instanceId, clock));
  };
  const giveRole = async (role: WorkerRole, handoffs: WorkerHandoffs, info: EngineInfo): Promise<void> => {
    if (role === "prefill") await handoffs.canOffer();
    if (role === "decode") logger.info({ sequences: sequencesThatFit(info) }, "whole sequences fit the KV memory");
  };
  await prepareRole(card.role);

  server.serve(address(GENERATE_ENDPOINT), service.handle);
  server.serve(address(TOKENIZER_ENDPOINT), serveBytes(tokenizer.bytes));
  server.serve(address(CLEAR_BLOCKS_ENDPOINT), clearBlocks(engine));
  server.serve(address(HANDOFF_ENDPOINT), (stream, payload) => {
    const handoffs = service.handoffs ?? service.engineHandoffs;
    if (handoffs !== undefined) return handoffs.handle(stream, payload);
    throw new DynamoError("handoff-gone", "this worker has handed no blocks over");
  });
  server.serve(address(EARLY_PULL_ENDPOINT), (stream, payload) => {
    if (service.handoffs === undefined) throw new DynamoError("handoff-gone", "this worker fetches no blocks");
    return service.handoffs.handleEarlyPull(stream, payload);
  });
  for (const { name, handler } of kvEvents.endpoints(info.dataParallelSize)) server.serve(address(name), handler);
  const canary = (timeoutMs: number): Promise<void> =>
    runCanary(planes.request.client, {
      address: server.address,
      endpoint: address(GENERATE_ENDPOINT),
      model: config.modelName,
      tokenIds: Uint32Array.of(tokenizer.bosTokenId ?? 1),
      timeoutMs,
    });
  await canary(CANARY_TIMEOUT_MS);

  let roleNow = (): WorkerRole => card.role;
  const systemServer =
    config.systemPort === undefined
      ? undefined
      : await startSystemServer({
          port: config.systemPort,
          metrics: planes.metrics,
          foreignMetrics: () => engine.ownMetrics?.() ?? "",
          ...(engine.searchLog === undefined ? {} : { searchLog: engine.searchLog.bind(engine) }),
          status: () => ({
            state: absence.isAbsent ? "engine-down" : lifecycle.state,
            instance_id: instanceId,
            model: config.modelName,
            role: roleNow(),
            load: engine.load(),
            ...(engine.describe === undefined ? {} : { engine: engine.describe() }),
            degraded: planeHealth.degradations,
          }),
        });
  if (systemServer !== undefined) lifecycle.defer("system server", () => systemServer.close());

  const loadReports = await planes.events.publish(LOAD_TOPIC, { publisherId: instanceId });
  lifecycle.defer("load publisher", () => loadReports.close());
  lifecycle.defer(
    "load timer",
    publishLoad({ publisher: loadReports, engine, kvTiers: tiered?.use, instanceId, clock, metrics }),
  );

  const lease = await openLastingLease(discovery, { clock, logger, random: planes.random });
  lifecycle.defer("lease", () => lease.close());
  const instance: Instance = {
    namespace: config.namespace,
    component: config.component,
    endpoint: GENERATE_ENDPOINT,
    instanceId,
    address: server.address,
    pid: process.pid,
    host: hostname(),
    startedMs: clock.wallMs(),
  };
  const register = async (role: WorkerRole): Promise<void> => {
    // An engine that comes back brings it back.
    if (absence.isAbsent) return;
    await registerInstance(lease, instance);
    await registerCard(lease, instance, { ...card, role });
  };
  await register(card.role);
  const unregister = async (): Promise<void> => {
    await lease.delete(cardKey(instance));
    await lease.delete(instanceKey(instance));
  };
  const roleSwitch = new RoleSwitch({
    role: card.role,
    logger,
    clock,
    prepare: prepareRole,
    unregister,
    settle: (timeoutMs) => service.settle(timeoutMs),
    register,
    settleTimeoutMs: config.drainTimeoutMs,
  });
  roleNow = () => roleSwitch.role;
  lifecycle.defer("role switch", () => roleSwitch.close());
  server.serve(address(ROLE_ENDPOINT), roleSwitch.handle);
  absence.serve({
    leave: unregister,
    comeBack: async (now) => {
      // Its age, which counts among the model's workers, is the worker's.
      card = { ...(await modelCard(config, now, tokenizer, clock.wallMs())), created: card.created };
      await canary(CANARY_TIMEOUT_MS);
      await register(roleSwitch.role);
    },
  });
  // An engine that is known to be away need not be asked.
  const watchCanary = (timeoutMs: number): Promise<void> => (absence.isAbsent ? Promise.resolve() : canary(timeoutMs));
  const { engineStallMs = ENGINE_STALL_MS, idleCanaryMs = IDLE_CANARY_MS } = config;
  lifecycle.defer(
    "engine watch",
    watchEngine({ engine, clock, stallMs: engineStallMs, idleMs: idleCanaryMs, canary: watchCanary, onStuck: fail }),
  );

  lifecycle.onDrain(async () => {
    // First out of discovery, so that nobody sends more; then finish what is here.
    roleSwitch.close();
    await lease.close();
    await server.drain();
    await engine.drain();
  });
  lifecycle.ready(signal);
  logger.info(
    {
      instance: instanceId,
      model: config.modelName,
      engine: info.engine,
      address: server.address,
      ms: Math.round(clock.monotonicMs() - startMs),
    },
    "worker ready",
  );
  return {
    ...lifecycle.role(),
    instanceId,
    systemPort: systemServer?.port,
    load: () => engine.load(),
    get role() {
      return roleSwitch.role;
    },
    get handoffs() {
      return service.handoffs;
    },
    get engineHandoffs() {
      return service.engineHandoffs;
    },
    describe: () => engine.describe?.() ?? {},
  };
}

async function modelCard(
  config: WorkerConfig,
  info: EngineInfo,
  tokenizer: ServedTokenizer,
  wallMs: number,
): Promise<ModelCard> {
  const { engine } = config;
  const fingerprint = engine.kind === "llama" ? await modelFingerprint(engine.modelPath, info) : undefined;
  return {
    version: 1,
    name: config.modelName,
    engine: info.engine,
    engineVersion: info.engineVersion,
    contextLength: info.contextLength,
    blockSizeTokens: info.blockSizeTokens,
    totalBlocks: info.totalBlocks,
    maxSequences: info.maxSequences,
    maxBatchedTokens: info.maxBatchedTokens,
    dataParallelSize: info.dataParallelSize,
    // Engines without weights take any token: what their tokenizer knows is the bound then.
    vocabularySize: config.engine.kind === "llama" ? info.vocabularySize : tokenizer.vocabularySize,
    tokenizerSha256: tokenizer.sha256,
    tokenizerBytes: tokenizer.bytes.length,
    types: tokenizer.hasChatTemplate ? ["chat", "completions"] : ["completions"],
    created: Math.floor(wallMs / 1_000),
    role: config.role ?? "agg",
    blockBytes: info.blockBytes,
    ...(info.answerForms === undefined ? {} : { answerForms: info.answerForms }),
    ...(info.kvEvents === undefined ? {} : { kvEvents: info.kvEvents }),
    ...(info.lacks === undefined ? {} : { lacks: info.lacks }),
    ...(info.tokens === undefined ? {} : { tokens: info.tokens }),
    ...(info.kvConnector === undefined ? {} : { kvConnector: info.kvConnector }),
    modelFingerprint: fingerprint?.map((half) => half.toString(16).padStart(8, "0")).join("") ?? "",
  };
}

function clearBlocks(engine: Engine): EndpointHandler {
  return (stream) => {
    engine.clearBlocks().then(
      (cleared) => {
        stream.write(Buffer.from(JSON.stringify({ cleared })));
        stream.end();
      },
      (thrown: unknown) => stream.end(toDynamoError(thrown)),
    );
    return { onCancel: () => undefined };
  };
}
