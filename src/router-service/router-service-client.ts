import { DynamoError } from "../errors/index.ts";
import type { Logger } from "../observability/index.ts";
import type { ModelCard } from "../protocol/index.ts";
import type { Router } from "../router/index.ts";
import { formatEndpoint, watchInstances, type Instance, type Planes } from "../runtime/component/index.ts";
import type { Watch } from "../runtime/discovery/index.ts";
import { MAX_ANSWER_BYTES, ROUTER_COMPONENT, ROUTE_ENDPOINT } from "./messages.ts";
import { RemoteRouter } from "./remote-router.ts";

/**
 * A frontend's side of the router services: which there are, and which is asked. The one that has been there longest is
 * asked, so that all frontends ask the same and one that joins does not take over with an empty view; the others stand
 * by. One that does not answer is left out for a second. Owned by the frontend's model registry, one for all models.
 */
export interface RouterServiceClientOptions {
  readonly namespace: string;
  /** How long a service may take to decide, or to say that the request waits in its queue. */
  readonly answerTimeoutMs: number;
}

/** Until a service that did not answer is tried again: a request that tries costs its client the answer timeout. */
const AVOID_MS = 1_000;
/** For updates and questions of operators. */
const ASK_TIMEOUT_MS = 5_000;

export class RouterServiceClient {
  readonly planes: Planes;
  readonly answerTimeoutMs: number;
  readonly #namespace: string;
  readonly #logger: Logger;
  readonly #instances = new Map<string, Instance>();
  readonly #avoidedUntilMs = new Map<string, number>();
  #ordered: readonly Instance[] = [];
  #watch: Watch | undefined;
  /** Whether the last request was placed without a service: logged when it changes. */
  #isFallingBack = false;

  constructor(planes: Planes, { namespace, answerTimeoutMs }: RouterServiceClientOptions) {
    this.planes = planes;
    this.answerTimeoutMs = answerTimeoutMs;
    this.#namespace = namespace;
    this.#logger = planes.logger;
  }

  /** Resolves when the services of now are known. */
  async start(): Promise<void> {
    const scope = { namespace: this.#namespace, component: ROUTER_COMPONENT, endpoint: ROUTE_ENDPOINT };
    this.#watch = await watchInstances(this.planes.discovery, scope, (change) => {
      if (change.type === "put") this.#instances.set(change.instance.instanceId, change.instance);
      else this.#instances.delete(change.instanceId);
      this.#avoidedUntilMs.delete(change.type === "put" ? change.instance.instanceId : change.instanceId);
      this.#ordered = [...this.#instances.values()].toSorted(
        (a, b) => a.startedMs - b.startedMs || (a.instanceId < b.instanceId ? -1 : 1),
      );
    });
  }

  /** `local` chooses when no service does. */
  forModel(local: Router, card: ModelCard): RemoteRouter {
    return new RemoteRouter({ link: this, local, model: card.name, blockSizeTokens: card.blockSizeTokens });
  }

  get instances(): readonly Instance[] {
    return this.#ordered;
  }

  /** The service to ask, of those not in `tried`; undefined when there is none. */
  pick(tried: ReadonlySet<string>): Instance | undefined {
    const nowMs = this.planes.clock.monotonicMs();
    return this.#ordered.find(
      ({ instanceId }) => !tried.has(instanceId) && (this.#avoidedUntilMs.get(instanceId) ?? -Infinity) <= nowMs,
    );
  }

  avoid(instanceId: string): void {
    if (!this.#instances.has(instanceId)) return;
    this.#avoidedUntilMs.set(instanceId, this.planes.clock.monotonicMs() + AVOID_MS);
  }

  /** Counts a request that was placed here in place of the service; the first of a row is logged. */
  fellBack(model: string, reason: string): void {
    this.planes.metrics.counter("dynamo_frontend_router_fallbacks_total").labels(model, reason).add();
    if (this.#isFallingBack) return;
    this.#isFallingBack = true;
    this.#logger.warn({ model, reason }, "the router service does not answer: requests are placed here until it does");
  }

  answered(): void {
    if (!this.#isFallingBack) return;
    this.#isFallingBack = false;
    this.#logger.info("the router service answers again");
  }

  endpoint(name: string): string {
    return formatEndpoint({ namespace: this.#namespace, component: ROUTER_COMPONENT, endpoint: name });
  }

  /** Asks and forgets: whatever becomes of it, the end of the booking's stream puts it right. */
  tell(address: string, endpoint: string, payload: Uint8Array): void {
    const nothing = (): void => undefined;
    this.#open(address, endpoint, payload, { timeoutMs: ASK_TIMEOUT_MS, onBytes: nothing, onEnd: nothing });
  }

  /** One question, one answer. Rejects with what the service says, or with what became of the connection. */
  ask(address: string, endpoint: string, payload: Uint8Array, timeoutMs = ASK_TIMEOUT_MS): Promise<Buffer> {
    const { promise, resolve, reject } = Promise.withResolvers<Buffer>();
    let answer = Buffer.alloc(0);
    const onEnd = (error: DynamoError | undefined): void => (error === undefined ? resolve(answer) : reject(error));
    const stream = this.#open(address, endpoint, payload, {
      timeoutMs,
      onBytes: (bytes) => {
        if (answer.length + bytes.length > MAX_ANSWER_BYTES) {
          stream.cancel(new DynamoError("malformed-frame", "the router service's answer is too long"));
        } else answer = Buffer.concat([answer, bytes]);
      },
      onEnd,
    });
    return promise;
  }

  async close(): Promise<void> {
    await this.#watch?.close();
  }

  #open(
    address: string,
    endpoint: string,
    payload: Uint8Array,
    {
      timeoutMs,
      onBytes,
      onEnd,
    }: {
      timeoutMs: number;
      onBytes: (bytes: Uint8Array) => void;
      onEnd: (error: DynamoError | undefined) => void;
    },
  ): { cancel(error: DynamoError): void } {
    return this.planes.request.client.open(
      address,
      payload,
      {
        endpoint: this.endpoint(endpoint),
        requestId: endpoint,
        traceparent: "",
        timeoutMs,
        autoCredit: true,
      },
      { onItem: (bytes, start, end) => onBytes(bytes.subarray(start, end)), onTurnEnd: () => undefined, onEnd },
    );
  }
}
