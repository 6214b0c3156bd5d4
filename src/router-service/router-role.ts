import { hostname } from "node:os";
import { toDynamoError } from "../errors/index.ts";
import { startSystemServer } from "../observability/index.ts";
import { DEFAULT_ROUTER_CONFIG } from "../router/index.ts";
import {
  RoleLifecycle,
  formatEndpoint,
  newInstanceId,
  openLastingLease,
  registerInstance,
  type Planes,
  type RunningRole,
} from "../runtime/component/index.ts";
import type { RouterServiceConfig } from "./config.ts";
import { ROUTER_COMPONENT, ROUTE_ENDPOINT } from "./messages.ts";
import { RouteService } from "./route-service.ts";
import { RoutedModels } from "./routed-models.ts";

export interface RunningRouter extends RunningRole {
  /** 16 hex digits. */
  readonly instanceId: string;
  /** On the request plane. */
  readonly address: string;
  readonly systemPort: number | undefined;
  /** Bookings that are alive, and requests that wait for one. */
  readonly bookingCount: number;
}

/**
 * The router role: the frontend's router as a service of its own, for many frontends that should have one view. Registers
 * once it follows discovery and load. It does not drain its bookings: nothing on a worker depends on it, and the
 * frontends whose requests still wait here choose for themselves. Throws `address-in-use`, `discovery-unavailable`.
 */
export async function startRouter(
  config: RouterServiceConfig,
  planes: Planes,
  signal: AbortSignal,
): Promise<RunningRouter> {
  const lifecycle = new RoleLifecycle({ logger: planes.logger, clock: planes.clock });
  try {
    return await start(config, planes, signal, lifecycle);
  } catch (thrown) {
    await lifecycle.stop();
    throw toDynamoError(thrown);
  }
}

async function start(
  config: RouterServiceConfig,
  planes: Planes,
  signal: AbortSignal,
  lifecycle: RoleLifecycle,
): Promise<RunningRouter> {
  const { clock, logger, metrics, discovery } = planes;
  const instanceId = newInstanceId(planes.random);
  const { namespace, routerMode } = config;
  const models = new RoutedModels(planes, config);
  const trackOutputBlocks = config.router?.trackOutputBlocks ?? DEFAULT_ROUTER_CONFIG.trackOutputBlocks;
  const service = new RouteService({ models, metrics, instanceId, routerMode, trackOutputBlocks });
  const server = await planes.request.listen();
  lifecycle.defer("request plane server", () => server.close());
  lifecycle.defer("routed models", () => models.close());
  await models.start();
  for (const { name, handler } of service.endpoints()) {
    server.serve(formatEndpoint({ namespace, component: ROUTER_COMPONENT, endpoint: name }), handler);
  }
  const systemServer =
    config.systemPort === undefined
      ? undefined
      : await startSystemServer({
          port: config.systemPort,
          metrics,
          status: () => ({ state: lifecycle.state, ...service.state() }),
        });
  if (systemServer !== undefined) lifecycle.defer("system server", () => systemServer.close());

  const lease = await openLastingLease(discovery, { clock, logger, random: planes.random });
  lifecycle.defer("lease", () => lease.close());
  await registerInstance(lease, {
    namespace,
    component: ROUTER_COMPONENT,
    endpoint: ROUTE_ENDPOINT,
    instanceId,
    address: server.address,
    pid: process.pid,
    host: hostname(),
    startedMs: clock.wallMs(),
  });
  lifecycle.onDrain(() => lease.close());
  lifecycle.ready(signal);
  logger.info({ instance: instanceId, mode: routerMode, address: server.address }, "router ready");
  const running = { instanceId, address: server.address, systemPort: systemServer?.port, ...lifecycle.role() };
  return Object.defineProperty(running, "bookingCount", { get: () => service.bookingCount }) as RunningRouter;
}
