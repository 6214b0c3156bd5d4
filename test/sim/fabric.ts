import type { BlockLink } from "../../src/engines/mocker/index.ts";
import { SharedLinks, type SharedLink } from "../../src/perf-model/index.ts";
import { SimNetwork } from "./network.ts";
import type { SimProcess, World } from "./world.ts";

/**
 * What moves KV blocks between and inside hosts, and what they contend for: each host has a network card, in and out, and a
 * bus between its engine's memory and its own; the object store has one way in and out for all.
 *
 *     engine ══ bus ══ host memory ══ disk (disk.ts)
 *                          ╚═ out/in ══ network ══ in/out of another host, or the store
 */
export interface FabricShape {
  /** Of a mock block's 64 bytes, which stand for the megabytes of a real one. */
  readonly cardBytesPerMs: number;
  readonly busBytesPerMs: number;
  readonly storeBytesPerMs: number;
}

export class Fabric {
  readonly links: SharedLinks;
  readonly store: SharedLink;
  readonly #shape: FabricShape;
  readonly #byName = new Map<string, SharedLink>();

  constructor(world: World, shape: FabricShape) {
    this.links = new SharedLinks({ monotonicMs: () => world.nowMs, setTimer: (ms, run) => world.timer(ms, run) });
    this.#shape = shape;
    this.store = { bytesPerMs: shape.storeBytesPerMs };
  }

  into(host: string): SharedLink {
    return this.#link(`${host} in`, this.#shape.cardBytesPerMs);
  }

  out(host: string): SharedLink {
    return this.#link(`${host} out`, this.#shape.cardBytesPerMs);
  }

  /** For an engine: its cache to host memory, and imported blocks the same way. `byteShare`: of what it says it moves. */
  bus(process: SimProcess, byteShare: number): BlockLink {
    const bus = this.#link(`${SimNetwork.hostOf(process)} bus`, this.#shape.busBytesPerMs);
    const under = new Set<() => void>();
    return {
      move: (byteCount) => {
        if (byteCount <= 0) return Promise.resolve();
        return new Promise((resolve) => {
          const end = (): void => {
            timer.cancel();
            under.delete(end);
            resolve();
          };
          const timer = this.links.move(byteCount * byteShare, [bus], () => process.enqueue(end));
          under.add(end);
        });
      },
      stop: () => {
        for (const end of under) end();
      },
    };
  }

  #link(name: string, bytesPerMs: number): SharedLink {
    let link = this.#byName.get(name);
    if (link === undefined) this.#byName.set(name, (link = { bytesPerMs }));
    return link;
  }
}
