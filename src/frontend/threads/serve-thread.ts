import type { MessagePort } from "node:worker_threads";
import type { Planes } from "../../runtime/component/index.ts";
import type { FrontendConfig, FrontendLimits } from "../config.ts";
import { startFrontend } from "../frontend.ts";
import { ThreadLink, failedMessage } from "./thread-link.ts";

/** What the host gives every thread. */
export interface ThreadSeat {
  /** Name of the booking bus. */
  readonly bookings: string;
  readonly threadCount: number;
}

/**
 * One serving thread, from start to end: a whole frontend on its own planes that listens on the port of all and takes its
 * part of the process's limits. Resolves when it left; a failure is told to the host, which ends the process.
 */
export async function serveFrontendThread(
  config: FrontendConfig,
  planes: Planes,
  host: MessagePort,
  { bookings, threadCount }: ThreadSeat,
): Promise<void> {
  const link = new ThreadLink(host, bookings, planes.logger);
  const abort = new AbortController();
  try {
    const httpPort = await link.listen;
    if (httpPort === undefined) return;
    const own = {
      ...config,
      httpPort,
      limits: partOf(config.limits, threadCount),
      router: routerPart(config, threadCount),
    };
    link.onLeave = () => abort.abort();
    const frontend = await startFrontend(own, planes, abort.signal, link);
    link.onLeave = (wish) => void (wish.type === "drain" ? frontend.drain(wish.timeoutMs) : frontend.stop());
    link.tell({ type: "ready", port: frontend.port });
    await frontend.done;
  } catch (thrown) {
    link.tell(failedMessage(thrown));
  } finally {
    await link.close();
  }
}

/** Limits that are of the process, in equal parts, rounded up. */
function partOf(limits: FrontendLimits, threadCount: number): FrontendLimits {
  const part = (count: number): number => Math.ceil(count / threadCount);
  return {
    ...limits,
    concurrentRequests: part(limits.concurrentRequests),
    ...(limits.concurrentPerModel === undefined ? {} : { concurrentPerModel: part(limits.concurrentPerModel) }),
    capacityShare: 1 / threadCount,
    queuedRequests: part(limits.queuedRequests),
    connections: part(limits.connections),
  };
}

function routerPart({ router }: FrontendConfig, threadCount: number): Partial<NonNullable<FrontendConfig["router"]>> {
  if (router?.queueLimit === undefined) return router ?? {};
  return { ...router, queueLimit: Math.ceil(router.queueLimit / threadCount) };
}
