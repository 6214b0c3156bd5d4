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
 * back end. A whole cluster in one process, and the simulator, run on it.
 */
export class MemoryNetwork {
  readonly agents = new Map<bigint, AgentContext>();
}

export class MemoryBackend implements TransferBackend {
  readonly name = "memory";
  readonly typical = { setupMs: 0.01, perDescriptorUs: 0.3, gigabytesPerSecond: 5 };
  readonly #context: AgentContext;
  readonly #network: MemoryNetwork;
  readonly #copies = new CopyQueue();

  constructor(context: AgentContext, network: MemoryNetwork) {
    this.#context = context;
    this.#network = network;
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
    const { local, remote } = job.pairs;
    const peer = this.#network.agents.get(job.peer.metadata.incarnation);
    if (peer === undefined) {
      setImmediate(() => job.end(peerGone(job.peer)));
      return;
    }
    try {
      for (let i = 0; i < remote.count; i++) checkOwn(peer, job, i);
    } catch (thrown) {
      setImmediate(() => job.end(thrown as DynamoError));
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
        else job.end(this.#deliver(peer, job.message));
      },
    });
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
    this.#copies.remove(job);
    setImmediate(() => job.end());
  }

  notify(peer: Peer, message: Uint8Array, _timeoutMs: number, done: (error?: DynamoError) => void): void {
    const target = this.#network.agents.get(peer.metadata.incarnation);
    setImmediate(() => done(target === undefined ? peerGone(peer) : this.#deliver(target, message)));
  }

  forget(): void {}

  close(): Promise<void> {
    this.#network.agents.delete(this.#context.incarnation);
    return Promise.resolve();
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
