import { DynamoError } from "../errors/index.ts";
import {
  unfit,
  type Obstacle,
  type AgentContext,
  type PairQuestion,
  type Peer,
  type TransferBackend,
} from "./backend.ts";
import { CopyQueue } from "./copy-queue.ts";
import type { TransferJob } from "./transfer-job.ts";

/**
 * Agents of one process, and an agent's transfers within itself: copies from memory to memory. Agents that share a
 * `MemoryNetwork` reach each other; what an agent may touch is checked against the other's registrations as on every other
 * back end. A whole cluster in one process, and the simulator, run on it: with a `MemoryLink` between the agents, bytes and
 * messages take the time and the breaks that it gives them.
 */
export class MemoryNetwork {
  readonly agents: Map<bigint, AgentContext>;
  readonly link: MemoryLink | undefined;

  /** `agents`: of networks that lead to the same ones by ways of their own. @default nobody yet, and no link */
  constructor(options: { readonly agents?: Map<bigint, AgentContext>; readonly link?: MemoryLink } = {}) {
    this.agents = options.agents ?? new Map();
    this.link = options.link;
  }
}

/** The way between two agents. */
export interface MemoryLink {
  /** Ends in `onArrived`, `onBroken`, or, as networks do, neither; and in neither after its `cancel`. */
  carry(crossing: MemoryCrossing): { cancel(): void };
}

export interface MemoryCrossing {
  readonly from: AgentContext;
  readonly to: AgentContext;
  /** The one of the two that began it. */
  readonly initiator: AgentContext;
  /** 0 for what only asks or answers. */
  readonly byteCount: number;
  /** On the loop of `to`, not inside `carry`. */
  readonly onArrived: () => void;
  /** On the loop of the initiator, not inside `carry`. */
  readonly onBroken: () => void;
}

export class MemoryBackend implements TransferBackend {
  readonly name = "memory";
  readonly typical = { setupMs: 0.01, perDescriptorUs: 0.3, gigabytesPerSecond: 5 };
  readonly #context: AgentContext;
  readonly #network: MemoryNetwork;
  readonly #copies: CopyQueue;
  /** Jobs whose bytes or message are on the way. */
  readonly #crossings = new Map<TransferJob, { cancel(): void }>();

  constructor(context: AgentContext, network: MemoryNetwork) {
    this.#context = context;
    this.#network = network;
    this.#copies = new CopyQueue(context.clock);
    network.agents.set(context.incarnation, context);
  }

  publish(): Uint8Array {
    return new Uint8Array(0);
  }

  register(): Promise<void> {
    return Promise.resolve();
  }

  deregister(): Promise<void> {
    return Promise.resolve();
  }

  obstacle({ peer, localKind, remoteKind }: PairQuestion): Obstacle | undefined {
    if (localKind !== "host" || remoteKind !== "host") return unfit("moves host memory only");
    if (!this.#network.agents.has(peer.metadata.incarnation)) return unfit("the peer is in another process");
    return undefined;
  }

  post(job: TransferJob): void {
    const peer = this.#network.agents.get(job.peer.metadata.incarnation);
    if (peer === undefined) {
      this.#later(() => job.end(peerGone(job.peer)));
      return;
    }
    const { link } = this.#network;
    if (link === undefined || job.peer.isSelf) this.#copy(job, peer);
    else {
      const isRead = job.operation === "read";
      this.#cross(link, job, { from: this.#context, to: peer, byteCount: isRead ? 0 : job.byteCount }, () => {
        const back = { from: peer, to: this.#context, byteCount: isRead ? job.byteCount : 0 };
        this.#cross(link, job, back, () => this.#copy(job, peer));
      });
    }
  }

  #copy(job: TransferJob, peer: AgentContext): void {
    const { local, remote } = job.pairs;
    try {
      for (let i = 0; i < remote.count; i++) checkOwn(peer, job, i);
    } catch (thrown) {
      this.#later(() => job.end(thrown as DynamoError));
      return;
    }
    const isAlive = (): boolean => this.#network.agents.get(peer.incarnation) === peer;
    const localBytes = (id: number): Buffer | undefined => this.#context.regions.find(id)?.bytes;
    const remoteBytes = (id: number): Buffer | undefined => (isAlive() ? peer.regions.find(id)?.bytes : undefined);
    const isRead = job.operation === "read";
    this.#copies.add({
      job,
      from: isRead ? remote : local,
      to: isRead ? local : remote,
      source: isRead ? remoteBytes : localBytes,
      destination: isRead ? localBytes : remoteBytes,
      onCopied: (isStale) => {
        if (isStale) job.end(isAlive() ? staleRegion() : peerGone(job.peer));
        else this.#finish(job, peer);
      },
    });
  }

  /** The message, and back the word that it was taken. */
  #finish(job: TransferJob, peer: AgentContext): void {
    const { message } = job;
    const { link } = this.#network;
    if (message === undefined || link === undefined || job.peer.isSelf) {
      job.end(this.#deliver(peer, message));
      return;
    }
    this.#cross(link, job, { from: this.#context, to: peer, byteCount: message.length }, () => {
      const error = this.#deliver(peer, message);
      this.#cross(link, job, { from: peer, to: this.#context, byteCount: 0 }, () => job.end(error));
    });
  }

  #cross(
    link: MemoryLink,
    job: TransferJob,
    way: Pick<MemoryCrossing, "from" | "to" | "byteCount">,
    onArrived: () => void,
  ): void {
    const crossing = link.carry({
      ...way,
      initiator: this.#context,
      onArrived: () => {
        this.#crossings.delete(job);
        onArrived();
      },
      onBroken: () => {
        this.#crossings.delete(job);
        job.end(peerGone(job.peer));
      },
    });
    this.#crossings.set(job, crossing);
  }

  #deliver(peer: AgentContext, message: Uint8Array | undefined): DynamoError | undefined {
    if (message === undefined) return undefined;
    try {
      peer.deliver(this.#context.name, Buffer.from(message));
      return undefined;
    } catch (thrown) {
      return thrown as DynamoError;
    }
  }

  stop(job: TransferJob): void {
    this.#crossings.get(job)?.cancel();
    this.#crossings.delete(job);
    this.#copies.remove(job);
    this.#later(() => job.end());
  }

  notify(peer: Peer, message: Uint8Array, _timeoutMs: number, done: (error?: DynamoError) => void): void {
    const target = this.#network.agents.get(peer.metadata.incarnation);
    const { link } = this.#network;
    if (target === undefined) this.#later(() => done(peerGone(peer)));
    else if (link === undefined || peer.isSelf) this.#later(() => done(this.#deliver(target, message)));
    else {
      const [initiator, onBroken] = [this.#context, (): void => done(peerGone(peer))];
      link.carry({
        from: initiator,
        to: target,
        initiator,
        byteCount: message.length,
        onBroken,
        onArrived: () => {
          const error = this.#deliver(target, message);
          const back = { from: target, to: initiator, initiator, byteCount: 0 };
          link.carry({ ...back, onBroken, onArrived: () => done(error) });
        },
      });
    }
  }

  forget(): void {}

  close(): Promise<void> {
    this.#network.agents.delete(this.#context.incarnation);
    return Promise.resolve();
  }

  #later(run: () => void): void {
    this.#context.clock.nextTurn(run);
  }
}

/** Within one agent every registered region may be used; between agents, what the other one allows. */
function checkOwn(peer: AgentContext, job: TransferJob, i: number): void {
  const { remote } = job.pairs;
  if (job.peer.isSelf) {
    if (peer.regions.find(remote.regionIds[i]!) === undefined) throw staleRegion();
    return;
  }
  peer.regions.check(remote.regionIds[i]!, remote.offsets[i]!, remote.lengths[i]!, job.operation);
}

export function staleRegion(): DynamoError {
  return new DynamoError("transfer-stale", "the memory was deregistered while the transfer ran");
}

export function peerGone(peer: Peer): DynamoError {
  return new DynamoError("transfer-peer-lost", `the agent ${peer.name} is gone`);
}
