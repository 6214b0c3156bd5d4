import { DynamoError, toDynamoError } from "../errors/index.ts";
import type { Logger } from "../observability/index.ts";
import { WORKER_ROLES, type WorkerRole } from "../protocol/index.ts";
import type { EndpointHandler } from "../runtime/request-plane/index.ts";
import type { Clock, TimerHandle } from "../std/index.ts";

/**
 * A worker's role, and its change while it runs: out of discovery, so that nobody sends more; what runs finishes, or is
 * handed over at the end of its time; then back into discovery under the new role. The engine and its cache stay, and a
 * request that comes meanwhile from somebody who has not heard of it yet is served as ever: none fails. One change at a time.
 * Discovery that cannot be written on the way back is tried until it can: a worker that serves is not left unknown.
 */
export interface RoleSwitchOptions {
  readonly role: WorkerRole;
  readonly logger: Logger;
  readonly clock: Clock;
  /** Throws when the worker cannot have that role. */
  readonly prepare: (role: WorkerRole) => Promise<void>;
  readonly unregister: () => Promise<void>;
  /** Resolves when nothing runs any more, after `timeoutMs` at the latest; what is left by then goes on elsewhere. */
  readonly settle: (timeoutMs: number) => Promise<void>;
  readonly register: (role: WorkerRole) => Promise<void>;
  readonly settleTimeoutMs: number;
}

const REGISTER_AGAIN_MS = 500;

export class RoleSwitch {
  readonly #options: RoleSwitchOptions;
  #role: WorkerRole;
  #isChanging = false;
  #isClosed = false;
  /** Between two tries to register. */
  #pause: { readonly timer: TimerHandle; readonly end: () => void } | undefined = undefined;

  constructor(options: RoleSwitchOptions) {
    this.#options = options;
    this.#role = options.role;
  }

  get role(): WorkerRole {
    return this.#role;
  }

  /** Throws `invalid-config` when it cannot, `unsupported-operation` while another change is under way. */
  async change(role: WorkerRole): Promise<void> {
    const { logger, prepare, unregister, settle, settleTimeoutMs } = this.#options;
    if (this.#isChanging) throw new DynamoError("unsupported-operation", "the worker is changing its role already");
    if (role === this.#role) return;
    this.#isChanging = true;
    try {
      await prepare(role);
      logger.info({ from: this.#role, to: role }, "role change: leaving discovery");
      try {
        await unregister();
        await settle(settleTimeoutMs);
        this.#role = role;
      } finally {
        await this.#register();
      }
      logger.info({ role }, "role change: back in discovery");
    } finally {
      this.#isChanging = false;
    }
  }

  /** The worker leaves discovery for good. */
  close(): void {
    this.#isClosed = true;
    this.#pause?.timer.cancel();
    this.#pause?.end();
  }

  /** Resolves when discovery knows the worker by its role, or when it is closed. */
  async #register(): Promise<void> {
    const { logger, clock, register } = this.#options;
    for (let isFirst = true; !this.#isClosed; isFirst = false) {
      try {
        return await register(this.#role);
      } catch (thrown) {
        const { reason, diagnostic } = toDynamoError(thrown);
        if (isFirst) logger.warn({ role: this.#role, reason, diagnostic }, "role change: not back in discovery yet");
      }
      await new Promise<void>((end) => {
        this.#pause = { timer: clock.setTimer(REGISTER_AGAIN_MS, end), end };
      });
      this.#pause = undefined;
    }
  }

  /** The endpoint `role`: `{"role": "decode"}`, answered in the same form when it has that role. */
  readonly handle: EndpointHandler = (stream, payload) => {
    const role = readRole(payload);
    this.change(role).then(
      () => {
        stream.write(Buffer.from(JSON.stringify({ role: this.#role })));
        stream.end();
      },
      (thrown: unknown) => stream.end(toDynamoError(thrown)),
    );
    return { onCancel: () => undefined };
  };
}

function readRole(payload: Uint8Array): WorkerRole {
  let role: unknown;
  try {
    role = (JSON.parse(Buffer.from(payload).toString("utf8")) as { role?: unknown } | null)?.role;
  } catch (cause) {
    throw new DynamoError("malformed-frame", "the role could not be read", { cause });
  }
  const known = WORKER_ROLES.find((each) => each === role);
  if (known !== undefined) return known;
  throw new DynamoError("invalid-field", `role: expected one of ${WORKER_ROLES.join(", ")}`, { param: "role" });
}
