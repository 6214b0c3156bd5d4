import { Metrics, readTraceSettings, type Logger, type Tracing } from "../observability/index.ts";
import {
  discoveryPublisherDirectory,
  newInstanceId,
  openLastingLease,
  type Planes,
} from "../runtime/component/index.ts";
import type { Discovery, Lease } from "../runtime/discovery/index.ts";
import type { EventPlane } from "../runtime/event-plane/index.ts";
import type { RequestPlane } from "../runtime/request-plane/index.ts";
import { systemClock, systemRandom, type Clock } from "../std/index.ts";
import { defaultDiscoveryFolder, type OptionValues } from "./options.ts";
import { milliseconds } from "./role-config.ts";

/**
 * Builds the planes that a role runs on from its options. Back ends are loaded only when chosen. What is built is owned
 * by the caller: `close` ends all of it, in the order event, request, discovery, so that leases outlive who needs them.
 */
export interface BuiltPlanes extends Planes {
  close(): Promise<void>;
}

/** Traces go where those of other planes of the process go, or somewhere of their own: `role` names it. */
export async function buildPlanes(
  values: OptionValues,
  logger: Logger,
  traces: { readonly role: string } | { readonly shared: Tracing | undefined },
): Promise<BuiltPlanes> {
  const clock = systemClock;
  const metrics = new Metrics();
  const ownTracing = "role" in traces ? await buildTracing(traces.role, clock, logger, metrics) : undefined;
  const discovery = await buildDiscovery(values, clock, logger);
  const request = await buildRequestPlane(values, clock, logger, metrics);
  const events = await buildEventPlane(values, discovery, clock, logger);
  return {
    discovery,
    request,
    events,
    clock,
    random: systemRandom,
    logger,
    metrics,
    tracing: "role" in traces ? ownTracing : traces.shared,
    async close() {
      await ownTracing?.close();
      await events.close();
      await request.close();
      await discovery.close();
    },
  };
}

/** The SDK is loaded only when traces are exported. */
async function buildTracing(
  role: string,
  clock: Clock,
  logger: Logger,
  metrics: Metrics,
): Promise<Tracing | undefined> {
  const settings = readTraceSettings(process.env, role);
  if (settings === undefined) return undefined;
  const { startTracing } = await import("../observability/otel-tracing.ts");
  logger.info({ url: settings.url, ratio: settings.sampleRatio }, "traces are exported");
  return startTracing({ ...settings, clock, logger, metrics, instanceId: newInstanceId() });
}

export async function buildDiscovery(values: OptionValues, clock: Clock, logger: Logger): Promise<Discovery> {
  const { FileDiscovery, MemoryDiscovery } = await import("../runtime/discovery/index.ts");
  if (values["discovery-backend"] === "memory") return new MemoryDiscovery({ clock, logger });
  return new FileDiscovery({ root: values["file-kv"] ?? defaultDiscoveryFolder(), clock, logger });
}

async function buildRequestPlane(
  values: OptionValues,
  clock: Clock,
  logger: Logger,
  metrics: Metrics,
): Promise<RequestPlane> {
  const { MemoryNetwork, MemoryRequestPlane, TcpRequestPlane } = await import("../runtime/request-plane/index.ts");
  if (values["request-plane"] === "memory") return new MemoryRequestPlane({ network: new MemoryNetwork(), clock });
  const advertiseHost = values["tcp-rpc-advertise-host"];
  const advertisePort = values["tcp-rpc-advertise-port"];
  const clusterSecret = values["cluster-secret"];
  return new TcpRequestPlane({
    host: values["tcp-rpc-host"],
    port: values["tcp-rpc-port"],
    ...(advertiseHost === undefined ? {} : { advertiseHost }),
    ...(advertisePort === undefined ? {} : { advertisePort }),
    ...(clusterSecret === undefined ? {} : { clusterSecret }),
    heartbeatMs: milliseconds(values["worker-heartbeat-timeout-secs"]) / HEARTBEAT_MISSES,
    heartbeatMisses: HEARTBEAT_MISSES,
    clock,
    logger,
    metrics,
  });
}

/** One lost answer is an accident, three in a row are not. */
const HEARTBEAT_MISSES = 3;

export async function buildEventPlane(
  values: OptionValues,
  discovery: Discovery,
  clock: Clock,
  logger: Logger,
): Promise<EventPlane> {
  const { MemoryEventBus, MemoryEventPlane, ZmqEventPlane } = await import("../runtime/event-plane/index.ts");
  if (values["event-plane"] === "memory") return new MemoryEventPlane({ bus: new MemoryEventBus(), clock });
  // Publishers of this process share one lease, opened by the first of them: a frontend never opens one.
  let lease: Promise<Lease> | undefined;
  const openLease = (): Promise<Lease> =>
    (lease ??= openLastingLease(discovery, { clock, logger, random: systemRandom }));
  const advertisedHost = values["zmq-advertise-host"];
  return new ZmqEventPlane({
    directory: discoveryPublisherDirectory(discovery, openLease, values.namespace),
    host: values["zmq-host"],
    ...(advertisedHost === undefined ? {} : { advertisedHost }),
    clock,
    logger,
  });
}
