import { SeededRandom, VirtualClock, type Clock, type Random, type TimerHandle } from "../../src/std/index.ts";
import type { EventLog } from "./event-log.ts";
import type { Marks } from "./marks.ts";

/**
 * Virtual time, chance and the order of things for one simulated run. Each simulated process has a queue of ready turns:
 * what its loop would do next. One step runs one turn, of a process that the seed picks, or, when nobody is ready, moves
 * time to the next timer. Between two steps node drains its microtasks and ticks, so what awaits goes on at once.
 *
 *     timer due / packet arrives -> process.enqueue -> (frozen? waits) -> step -> microtasks -> step ...
 *
 * Nothing else is a source of order: no real timer, no I/O, no clock of the machine. A step costs what it does plus about
 * 0.3 us; steps are run as `setImmediate` callbacks in batches, because only there node drains both of its queues.
 */
const EPOCH_MS = 1_700_000_000_000;
const STEPS_PER_BATCH = 64;
/** Time goes in steps of 1/1024 ms, so that sums and differences of times are exact: no wake-up comes a hair too early. */
const TICKS_PER_MS = 1_024;
/** Steps at one moment, above which something goes round in circles. A busy moment has some hundreds. */
const MAX_STEPS_AT_ONCE = 100_000;

export class World {
  readonly seed: number;
  readonly random: Random;
  readonly log: EventLog;
  readonly marks: Marks;
  readonly #timers = new VirtualClock();
  readonly #ready: SimProcess[] = [];
  #processes = 0;
  #liveTimers = 0;
  steps = 0;
  #stepMs = -1;
  #stepsAtOnce = 0;
  /** Whatever escaped to the loop: it would have ended a real process. */
  readonly crashes: { readonly process: string; readonly error: unknown }[] = [];

  constructor(seed: number, log: EventLog, marks: Marks) {
    this.seed = seed;
    this.random = new SeededRandom(seed);
    this.log = log;
    this.marks = marks;
  }

  get nowMs(): number {
    return this.#timers.monotonicMs();
  }

  /** Timers set by anyone and not fired or cancelled. */
  get timerCount(): number {
    return this.#liveTimers;
  }

  /** The log of what happened, and of nothing else: it is what two runs of a seed are compared by. */
  record(text: string): void {
    this.log.add(this.nowMs, text);
  }

  /** A timer of the world itself: of the network, of the plan of faults. Due timers of an instant run in order of creation. */
  timer(delayMs: number, run: () => void): TimerHandle {
    this.#liveTimers++;
    let isLive = true;
    const end = (): boolean => {
      if (!isLive) return false;
      isLive = false;
      this.#liveTimers--;
      return true;
    };
    const handle = this.#timers.setTimer(Math.ceil(delayMs * TICKS_PER_MS) / TICKS_PER_MS, () => {
      if (end()) run();
    });
    return {
      cancel: () => {
        if (end()) handle.cancel();
      },
    };
  }

  process(name: string): SimProcess {
    return new SimProcess(this, name, this.#processes++);
  }

  /** A `Random` of its own, so that what one part draws does not move another part's numbers. */
  fork(): Random {
    return new SeededRandom(this.random.nextU32());
  }

  /** @internal */
  becameReady(process: SimProcess): void {
    this.#ready.push(process);
  }

  /** Runs until `done` holds, time is `untilMs` or nothing is left to do. */
  run(untilMs: number, done: () => boolean = () => false): Promise<"done" | "time" | "idle"> {
    return new Promise((resolve, reject) => {
      let isOver = false;
      const step = (): void => {
        if (isOver) return;
        try {
          const outcome = done() ? "done" : this.#step(untilMs);
          if (outcome === undefined) return;
          isOver = true;
          resolve(outcome);
        } catch (error) {
          isOver = true;
          reject(error as Error);
        }
      };
      const batch = (): void => {
        for (let i = 1; i < STEPS_PER_BATCH; i++) setImmediate(step);
        // The last of a batch sets up the next: none is left behind when the run is over.
        setImmediate(() => {
          step();
          if (!isOver) batch();
        });
      };
      batch();
    });
  }

  #step(untilMs: number): "time" | "idle" | undefined {
    this.steps++;
    if (this.#timers.monotonicMs() !== this.#stepMs) {
      this.#stepMs = this.nowMs;
      this.#stepsAtOnce = 0;
    } else if (++this.#stepsAtOnce > MAX_STEPS_AT_ONCE) {
      throw new Error(`time stands still at ${this.nowMs} ms`);
    }
    const ready = this.#ready;
    if (ready.length > 0) {
      const at = ready.length === 1 ? 0 : this.random.nextU32() % ready.length;
      const process = ready[at]!;
      if (!process.runTurn()) {
        ready[at] = ready[ready.length - 1]!;
        ready.pop();
      }
      return undefined;
    }
    const nextMs = this.#timers.nextDueMs();
    if (nextMs === undefined) return "idle";
    if (nextMs > untilMs) {
      this.#timers.moveTo(untilMs);
      return "time";
    }
    this.#timers.runNext();
    return undefined;
  }
}

export type ProcessState = "running" | "frozen" | "dead";

/** One simulated process: its clock, its turns, its life. */
export class SimProcess {
  readonly name: string;
  readonly id: number;
  readonly random: Random;
  readonly clock: Clock;
  state: ProcessState = "running";
  /** Added to the wall clock: changed when it jumps. */
  wallOffsetMs = 0;
  readonly #world: World;
  #turns: (() => void)[] = [];
  #next = 0;
  #isReady = false;
  readonly #timers = new Set<TimerHandle>();
  /** Timers that came due while it was frozen: its loop looks at those before it reads any socket. */
  #overdue: (() => void)[] = [];

  constructor(world: World, name: string, id: number) {
    this.#world = world;
    this.name = name;
    this.id = id;
    this.random = world.fork();
    this.clock = {
      monotonicMs: () => world.nowMs,
      wallMs: () => EPOCH_MS + world.nowMs + this.wallOffsetMs,
      setTimer: (delayMs, run) => this.#setTimer(delayMs, run),
      nextTurn: (run) => this.enqueue(run),
    };
  }

  get timerCount(): number {
    return this.#timers.size;
  }

  /** Its loop will run this, in the order of the calls; never if it is dead by then. */
  enqueue(run: () => void): void {
    if (this.state === "dead") return;
    this.#turns.push(run);
    this.#wake();
  }

  /** As `enqueue`, from a timer of the world: at once if nothing else of this process waits, which saves a step. */
  interrupt(run: () => void): void {
    if (this.state === "running" && this.#next === this.#turns.length) this.#run(run);
    else this.enqueue(run);
  }

  #run(run: () => void): void {
    try {
      run();
    } catch (error) {
      this.#world.crashes.push({ process: this.name, error });
    }
  }

  /** SIGSTOP: nothing of it runs; what happens to it waits. */
  freeze(): void {
    if (this.state === "running") this.state = "frozen";
  }

  /** SIGCONT. */
  thaw(): void {
    if (this.state !== "frozen") return;
    this.state = "running";
    this.#turns = [...this.#overdue, ...this.#turns.slice(this.#next)];
    this.#next = 0;
    this.#overdue = [];
    this.#wake();
  }

  /** SIGKILL. */
  kill(): void {
    this.state = "dead";
    this.#turns = [];
    this.#overdue = [];
    this.#next = 0;
    for (const timer of this.#timers) timer.cancel();
    this.#timers.clear();
  }

  /** @internal One turn; false when there is none after it. */
  runTurn(): boolean {
    if (this.state === "running" && this.#next < this.#turns.length) {
      const run = this.#turns[this.#next++]!;
      if (this.#next === this.#turns.length) {
        this.#turns = [];
        this.#next = 0;
      }
      this.#run(run);
    }
    this.#isReady = this.state === "running" && this.#next < this.#turns.length;
    return this.#isReady;
  }

  #wake(): void {
    if (this.#isReady || this.state !== "running" || this.#turns.length === this.#next) return;
    this.#isReady = true;
    this.#world.becameReady(this);
  }

  #setTimer(delayMs: number, run: () => void): TimerHandle {
    if (this.state === "dead") return { cancel: () => undefined };
    let isCancelled = false;
    const timer = this.#world.timer(delayMs, () => {
      this.#timers.delete(timer);
      const fire = (): void => {
        if (!isCancelled) run();
      };
      if (this.state === "frozen") this.#overdue.push(fire);
      else this.interrupt(fire);
    });
    this.#timers.add(timer);
    return {
      cancel: () => {
        isCancelled = true;
        this.#timers.delete(timer);
        timer.cancel();
      },
    };
  }
}
