import type { Clock, TimerHandle } from "../../src/std/index.ts";
import { MemoryNetwork, type AgentContext, type MemoryCrossing, type MemoryLink } from "../../src/transfer/index.ts";
import type { Fabric } from "./fabric.ts";
import { SimNetwork } from "./network.ts";
import type { SimProcess, World } from "./world.ts";

/**
 * The transfer plane between simulated workers: the transfer library's `memory` back end over links that take time, wait
 * and break, as the way through a network does. It goes with the network's faults and has one of its own, a stall: bytes
 * wait though everything else goes through.
 *
 *     killed, closed   whoever waits for it hears that it is gone
 *     lost power       nobody hears anything: the transfer's deadline ends it
 *     frozen           what comes to it waits
 *     partition        what is on the way waits
 */
export interface TransferWatch {
  /** Blocks begin to move, and will take so long if nothing happens. */
  onBegin(reader: SimProcess, owner: SimProcess, takesMs: number): void;
  /** They are there. */
  onArrived(reader: SimProcess, owner: SimProcess): void;
}

interface Crossing extends MemoryCrossing {
  readonly fromProcess: SimProcess;
  readonly toProcess: SimProcess;
  isOver: boolean;
  /** Of its bytes, over the links. */
  move: TimerHandle | undefined;
}

export class SimTransfers implements MemoryLink {
  readonly #world: World;
  readonly #network: SimNetwork;
  readonly #fabric: Fabric;
  readonly #agents = new Map<bigint, AgentContext>();
  /** Each process has a clock of its own. */
  readonly #processes = new Map<Clock, SimProcess>();
  readonly #vanished = new Set<SimProcess>();
  readonly #crossings = new Set<Crossing>();
  #isStalled = false;
  #waiting: (() => void)[] = [];
  watch: TransferWatch | undefined = undefined;
  /** Of those that arrived: how long they would have taken alone, and took. */
  readonly arrived = { count: 0, aloneMs: 0, tookMs: 0 };

  constructor(world: World, network: SimNetwork, fabric: Fabric) {
    this.#world = world;
    this.#network = network;
    this.#fabric = fabric;
  }

  /** For a worker's transfer agent. */
  networkOf(process: SimProcess): MemoryNetwork {
    this.#processes.set(process.clock, process);
    return new MemoryNetwork({ agents: this.#agents, link: this });
  }

  /** Transfers under way that nobody has given up. */
  get count(): number {
    return this.#crossings.size;
  }

  stall(): void {
    this.#isStalled = true;
  }

  resume(): void {
    this.#isStalled = false;
    const waiting = this.#waiting;
    this.#waiting = [];
    for (const go of waiting) go();
  }

  /** The process is dead. `isSilent`: with its host, so that nobody is told. */
  lost(process: SimProcess, isSilent: boolean): void {
    if (isSilent) this.#vanished.add(process);
    for (const crossing of this.#crossings) {
      const { fromProcess, toProcess } = crossing;
      if (fromProcess !== process && toProcess !== process) continue;
      if (isSilent) continue;
      this.#break(crossing);
    }
  }

  /** The connection of blocks on their way from `owner` to `reader` breaks; false when none are. */
  breakBetween(owner: SimProcess, reader: SimProcess): boolean {
    for (const crossing of this.#crossings) {
      if (crossing.fromProcess !== owner || crossing.toProcess !== reader || !isBlocks(crossing)) continue;
      this.#break(crossing);
      return true;
    }
    return false;
  }

  carry(crossing: MemoryCrossing): { cancel(): void } {
    const fromProcess = this.#processOf(crossing.from);
    const toProcess = this.#processOf(crossing.to);
    const under: Crossing = { ...crossing, fromProcess, toProcess, isOver: false, move: undefined };
    this.#crossings.add(under);
    const [from, to] = [SimNetwork.hostOf(fromProcess), SimNetwork.hostOf(toProcess)];
    const { bytesPerMs } = this.#network.fault(from, to);
    const latencyMs = this.#network.latency(from, to);
    const arrive = (): void => this.#arrive(under, from, to);
    if (isBlocks(under)) {
      const links = [this.#fabric.out(from), this.#fabric.into(to)];
      const aloneMs = latencyMs + under.byteCount / Math.min(...links.map((link) => link.bytesPerMs));
      const startMs = this.#world.nowMs;
      // A slow link is slow for these, too: they take twice their time.
      const crossedTwice = bytesPerMs === Infinity ? 1 : 2;
      this.watch?.onBegin(toProcess, fromProcess, aloneMs * crossedTwice);
      this.#world.timer(latencyMs, () => {
        if (under.isOver) return;
        under.move = this.#fabric.links.move(under.byteCount * crossedTwice, links, () => {
          this.arrived.count++;
          this.arrived.aloneMs += aloneMs;
          this.arrived.tookMs += this.#world.nowMs - startMs;
          arrive();
        });
      });
    } else this.#world.timer(latencyMs, arrive);
    return { cancel: () => this.#over(under) };
  }

  #arrive(crossing: Crossing, from: string, to: string): void {
    if (crossing.isOver) return;
    const again = (): void => this.#arrive(crossing, from, to);
    if (this.#network.fault(from, to).blocked) {
      this.#network.whenOpen(from, to, again);
      return;
    }
    if (this.#isStalled && isBlocks(crossing)) {
      this.#world.marks.mark("transfer stalled");
      this.#waiting.push(again);
      return;
    }
    const { fromProcess, toProcess } = crossing;
    if (this.#vanished.has(fromProcess) || this.#vanished.has(toProcess)) return;
    // Either one's kernel has closed the connection.
    if (toProcess.state === "dead" || fromProcess.state === "dead") {
      this.#break(crossing);
      return;
    }
    // The side that has the bytes must run to send them.
    if (fromProcess.state === "frozen") {
      fromProcess.enqueue(again);
      return;
    }
    toProcess.enqueue(() => {
      if (crossing.isOver) return;
      this.#over(crossing);
      if (isBlocks(crossing)) this.watch?.onArrived(toProcess, fromProcess);
      crossing.onArrived();
    });
  }

  #break(crossing: Crossing): void {
    const process = this.#processOf(crossing.initiator);
    const other = crossing.fromProcess === process ? crossing.toProcess : crossing.fromProcess;
    this.#world.timer(this.#network.latency(SimNetwork.hostOf(other), SimNetwork.hostOf(process)), () => {
      process.enqueue(() => {
        if (crossing.isOver) return;
        this.#over(crossing);
        crossing.onBroken();
      });
    });
  }

  #over(crossing: Crossing): void {
    crossing.isOver = true;
    crossing.move?.cancel();
    this.#crossings.delete(crossing);
  }

  #processOf({ clock }: AgentContext): SimProcess {
    return this.#processes.get(clock)!;
  }
}

/** On the way to the one that reads them. */
function isBlocks({ byteCount, to, initiator }: Crossing): boolean {
  return byteCount > 0 && to === initiator;
}
