import { ROLE_ENDPOINT } from "../../src/protocol/index.ts";
import { formatEndpoint } from "../../src/runtime/component/index.ts";
import { ask } from "../../src/runtime/request-plane/index.ts";
import { MODEL, type Cluster, type Seat } from "./cluster.ts";
import type { PlannedFault } from "./faults.ts";
import { decodes, routedWorkers } from "./role-checks.ts";
import type { TransferWatch } from "./transfers.ts";
import type { Draw } from "./workload.ts";
import type { SimProcess } from "./world.ts";

type Phase = "exported" | "begun" | "arrived";

interface Strike {
  readonly phase: Phase;
  readonly untilMs: number;
  readonly run: (prefill: Seat, decode: Seat | undefined, takesMs: number) => void;
}

/** The part of the nemesis that waits for a handoff and strikes at a point of it. */
export class RoleFaults implements TransferWatch {
  readonly #cluster: Cluster;
  readonly #draw: Draw;
  /** Of those that wait for their handoff, the oldest first. */
  #strikes: Strike[] = [];
  /** Transfers under way and done, by the process that owns the blocks. */
  readonly #begun = new Map<SimProcess, number>();
  readonly #arrived = new Map<SimProcess, number>();

  /** They decode until they have another role, and cannot be counted on. */
  readonly #turning = new Set<SimProcess>();

  constructor(cluster: Cluster, draw: Draw) {
    this.#cluster = cluster;
    this.#draw = draw;
    if (cluster.transfers === undefined) return;
    cluster.transfers.watch = this;
    cluster.onExport = (seat) => this.#reached("exported", seat, undefined, 0);
  }

  /** True when it was armed or done. */
  strike({ kind, forMs, seat: wanted }: PlannedFault, took: () => void, undo: (run: () => void) => void): void {
    const { world, transfers } = this.#cluster;
    const { marks } = world;
    if (transfers === undefined) return;
    const untilMs = world.nowMs + forMs;
    const arm = (phase: Phase, run: Strike["run"]): void => void this.#strikes.push({ phase, untilMs, run });
    switch (kind) {
      case "kill prefill before transfer":
        return arm("exported", (prefill) => {
          const { process } = prefill;
          const begun = this.#begun.get(process) ?? 0;
          this.#soon(this.#draw.real(0, 1.2), prefill, () => {
            took();
            const isBefore = (this.#begun.get(process) ?? 0) === begun;
            marks.mark(isBefore ? "prefill worker killed before its transfer" : "worker killed mid-stream");
            this.#cluster.kill(prefill);
          });
        });
      case "kill prefill during transfer":
        return arm("begun", (prefill, _decode, takesMs) => {
          const arrived = this.#arrived.get(prefill.process) ?? 0;
          const { process } = prefill;
          this.#soon(takesMs * this.#draw.real(0.1, 0.9), prefill, () => {
            took();
            if ((this.#arrived.get(process) ?? 0) === arrived) marks.mark("prefill worker killed during its transfer");
            this.#cluster.kill(prefill);
          });
        });
      case "kill prefill after transfer":
        return arm("arrived", (prefill) => {
          this.#soon(this.#draw.real(0, 1), prefill, () => {
            took();
            marks.mark("prefill worker killed after its transfer");
            this.#cluster.kill(prefill);
          });
        });
      case "power off prefill during transfer":
        return arm("begun", (prefill, _decode, takesMs) => {
          this.#soon(takesMs * this.#draw.real(0.1, 0.9), prefill, () => {
            took();
            marks.mark("prefill worker lost power during its transfer");
            this.#cluster.kill(prefill, true);
          });
        });
      case "kill decode while pulling":
        return arm("begun", (_prefill, decode, takesMs) => {
          this.#soon(takesMs * this.#draw.real(0.1, 0.9), decode!, () => {
            took();
            marks.mark("decode worker killed while pulling");
            this.#cluster.kill(decode!);
          });
        });
      case "break transfer":
        return arm("begun", (prefill, decode, takesMs) => {
          this.#soon(takesMs * this.#draw.real(0.1, 0.9), prefill, () => {
            if (!transfers.breakBetween(prefill.process, decode!.process)) return;
            took();
            marks.mark("transfer broken");
          });
        });
      case "stall transfers":
        took();
        transfers.stall();
        return undo(() => transfers.resume());
      case "change role":
        return this.#changeRole(wanted, took);
      default:
        return;
    }
  }

  /** What waits for a handoff strikes no more. */
  stop(): void {
    this.#strikes = [];
  }

  onBegin(reader: SimProcess, owner: SimProcess, takesMs: number): void {
    this.#begun.set(owner, (this.#begun.get(owner) ?? 0) + 1);
    this.#reached("begun", this.#seatOf(owner), this.#seatOf(reader), takesMs);
  }

  onArrived(reader: SimProcess, owner: SimProcess): void {
    this.#cluster.world.marks.mark("blocks handed over");
    this.#arrived.set(owner, (this.#arrived.get(owner) ?? 0) + 1);
    this.#reached("arrived", this.#seatOf(owner), this.#seatOf(reader), 0);
  }

  #reached(phase: Phase, prefill: Seat | undefined, decode: Seat | undefined, takesMs: number): void {
    if (prefill === undefined || (decode === undefined && phase !== "exported")) return;
    const { nowMs } = this.#cluster.world;
    this.#strikes = this.#strikes.filter(({ untilMs }) => untilMs >= nowMs);
    const at = this.#strikes.findIndex((strike) => strike.phase === phase);
    if (at < 0) return;
    const [strike] = this.#strikes.splice(at, 1);
    strike!.run(prefill, decode, takesMs);
  }

  /** If it is alive and itself still. */
  #soon(delayMs: number, seat: Seat, run: () => void): void {
    const { process } = seat;
    this.#cluster.world.timer(delayMs, () => {
      if (seat.process === process && seat.isServing) run();
    });
  }

  #seatOf(process: SimProcess): Seat | undefined {
    return this.#cluster.workers.find((seat) => seat.process === process);
  }

  /** As an operator asks for it, by way of a frontend. One that decodes stays. */
  #changeRole(wanted: number | undefined, took: () => void): void {
    const { workers, frontends, world } = this.#cluster;
    const frontend = frontends.find((seat) => seat.isServing);
    const may = workers.filter(
      (seat, index) =>
        seat.isServing &&
        (wanted ?? index) === index &&
        // One that is to decode after a restart too.
        workers.some(
          (other) =>
            other !== seat &&
            other.isServing &&
            other.workerRole !== "prefill" &&
            decodes(other) &&
            !this.#turning.has(other.process),
        ),
    );
    if (frontend === undefined || may.length === 0) return;
    const seat = this.#draw.pick(may);
    const { worker, process } = seat;
    const role = this.#draw.pick((["prefill", "decode", "agg"] as const).filter((each) => each !== worker!.role));
    const known = routedWorkers(frontend.frontend?.models.find(MODEL));
    const address = known.find(({ instanceId }) => instanceId === worker!.instanceId)?.address;
    if (address === undefined) return;
    took();
    world.record(`${process.name} is to be a ${role} worker`);
    this.#turning.add(process);
    this.#cluster.trouble(seat, Infinity, "draining");
    const endpoint = formatEndpoint({ namespace: "dynamo", component: "backend", endpoint: ROLE_ENDPOINT });
    let isOver = false;
    const over = (how: string): void => {
      if (isOver) return;
      isOver = true;
      this.#turning.delete(process);
      world.record(`${process.name}: change of role: ${how}`);
      if (seat.process === process && seat.isServing) this.#cluster.recovered(seat);
    };
    // The frontend that asked may be gone by then.
    world.timer(ROLE_CHANGE_MS + 1_000, () => over("not heard of"));
    frontend.process.enqueue(() => {
      ask(frontend.planes!.request.client, address, Buffer.from(JSON.stringify({ role })), {
        endpoint,
        requestId: "role",
        traceparent: "",
        timeoutMs: ROLE_CHANGE_MS,
      }).then(
        () => {
          world.marks.mark("role changed");
          seat.roles.push({ role, fromMs: world.nowMs });
          over("done");
        },
        (error: unknown) => over(String(error)),
      );
    });
  }
}

/** The drain limit and some. */
const ROLE_CHANGE_MS = 10_000;
