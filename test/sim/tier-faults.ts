import type { Cluster, Seat } from "./cluster.ts";
import type { PlannedFault } from "./faults.ts";
import type { Draw } from "./workload.ts";
import type { SimProcess } from "./world.ts";

/** The part of the nemesis for disks and the object store. */
export class TierFaults {
  readonly #cluster: Cluster;
  readonly #draw: Draw;
  /** Waits for a write to strike in the middle of it. */
  #onWrite: ((seat: Seat) => void)[] = [];

  constructor(cluster: Cluster, draw: Draw) {
    this.#cluster = cluster;
    this.#draw = draw;
    for (const { disk } of cluster.workers) if (disk !== undefined) disk.onWrite = (process) => this.#wrote(process);
  }

  strike({ kind, forMs, seat: wanted }: PlannedFault, took: () => void, undo: (run: () => void) => void): void {
    const { world, workers, objects } = this.#cluster;
    const { marks } = world;
    const seats = workers.filter((_, index) => (wanted ?? index) === index);
    const seat = seats.length === 0 ? undefined : this.#draw.pick(seats);
    const disk = seat?.disk;
    if (seat === undefined || disk === undefined || objects === undefined) return;
    switch (kind) {
      case "disk full":
      case "disk hangs":
      case "disk fails":
        took();
        disk.setState(kind === "disk full" ? "full" : kind === "disk hangs" ? "hangs" : "fails");
        return undo(() => disk.setState("well"));
      case "disk slow":
        took();
        marks.mark("disk slow");
        disk.slowDown(true);
        return undo(() => disk.slowDown(false));
      case "disk loses its file":
        if (!disk.loseNames()) return;
        took();
        marks.mark("file of the disk tier lost");
        return;
      case "bits flip":
        if (disk.flip(20) === 0) return;
        took();
        marks.mark("bit flipped on disk");
        return;
      case "kill worker mid-write":
      case "power off worker mid-write": {
        const untilMs = world.nowMs + forMs;
        this.#onWrite.push((writer) => {
          const { process } = writer;
          world.timer(this.#draw.real(0, 0.3), () => {
            if (writer.process !== process || !writer.isServing || world.nowMs > untilMs) return;
            took();
            this.#cluster.kill(writer, kind === "power off worker mid-write");
          });
        });
        return;
      }
      case "store down":
      case "store hangs":
        took();
        objects.setState(kind === "store down" ? "down" : "hangs");
        return undo(() => objects.setState("well"));
      case "store corrupts":
        if (objects.corrupt(0.9) === 0) return;
        took();
        marks.mark("objects damaged");
        return;
      default:
    }
  }

  /** What waits for a write strikes no more. */
  stop(): void {
    this.#onWrite = [];
  }

  #wrote(process: SimProcess): void {
    if (this.#onWrite.length === 0) return;
    const seat = this.#cluster.workers.find((one) => one.process === process);
    if (seat?.isServing === true) this.#onWrite.shift()!(seat);
  }
}
