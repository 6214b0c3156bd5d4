import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { SeededRandom, type Random } from "../../src/std/index.ts";

/**
 * A small fuzzer without coverage feedback. A target makes inputs from a random source, usually by mutating valid ones
 * (`mutate-bytes.ts`, `mutate-json.ts`), and says of each whether the code under test held: no exception but an allowed
 * error, no wrong result. The fuzzer adds what holds for all of them:
 *
 *     time      one input takes at most `MAX_CPU_MS` of CPU and `MAX_CASE_MS`; a real hang is reported and ended by a thread (watchdog.ts)
 *     memory    what is in use after a collection grows by at most `MAX_GROWTH_BYTES` over a run
 *     process   no unhandled rejection, no uncaught exception
 *
 * Input number n of seed s is always the same: a failure is replayed with `--seed=s --case=n`. A failing input is made
 * smaller by its target's `smaller` as long as it fails in the same way, and printed.
 */
export interface FuzzTarget<Input> {
  readonly name: string;
  /** What is fed to what, for people. */
  readonly about: string;
  generate(random: Random): Input;
  /** Throws when the code under test did not hold; an allowed error is no throw. */
  run(input: Input): void | Promise<void>;
  /** Simpler inputs to try, best first. May be endless work: the fuzzer stops taking. */
  smaller(input: Input): Iterable<Input>;
  show(input: Input): string;
  /** Ends what the target started: servers, files. */
  close?(): Promise<void> | void;
}

/** A target of some input type. */
export interface AnyTarget {
  readonly name: string;
  readonly about: string;
  fuzz(options: FuzzOptions): Promise<FuzzReport>;
  close(): Promise<void>;
}

export function targetOf<Input>(target: FuzzTarget<Input>): AnyTarget {
  return {
    name: target.name,
    about: target.about,
    fuzz: (options) => fuzz(target, options),
    close: async () => target.close?.(),
  };
}

export interface FuzzOptions {
  readonly seed: number;
  /** At least one of the two. */
  readonly durationMs?: number;
  readonly cases?: number;
  /** However long they take: on a busy machine a time box alone may be over before anything was tried. @default 1 */
  readonly minCases?: number;
  /** Only this one. */
  readonly onlyCase?: number;
  /** Told before each case, for the watchdog. */
  readonly onCase?: (index: number) => void;
}

export interface FuzzReport {
  readonly name: string;
  readonly seed: number;
  readonly caseCount: number;
  readonly slowestMs: number;
  readonly failure: FuzzFailure | undefined;
}

export interface FuzzFailure {
  readonly caseIndex: number;
  readonly message: string;
  readonly stack: string;
  /** The smallest input found that fails in the same way. */
  readonly input: string;
}

const MAX_CPU_MS = 2_000;
/** For what waits and uses no CPU: nothing fed here has a timer nearly so long. */
const MAX_CASE_MS = 60_000;
const MAX_GROWTH_BYTES = 128 * 1024 * 1024;
/** Before the growth counts: code compiled, buffers of their usual size. */
const WARM_UP_CASES = 200;
const MEMORY_LOOK_CASES = 1_024;
const MAX_SHRINK_MS = 10_000;

setFlagsFromString("--expose-gc");
const collect = runInNewContext("gc") as () => void;

/** In use after a full collection. */
function liveBytes(): number {
  collect();
  const { heapUsed, external } = process.memoryUsage();
  return heapUsed + external;
}

/** Deterministic: the random source of one case. */
export function caseRandom(seed: number, index: number): Random {
  return new SeededRandom((Math.imul(seed, 0x9e37_79b1) ^ Math.imul(index + 1, 0x85eb_ca6b)) >>> 0);
}

async function fuzz<Input>(target: FuzzTarget<Input>, options: FuzzOptions): Promise<FuzzReport> {
  const { seed, cases = Infinity, durationMs = Infinity, minCases = 1, onlyCase, onCase } = options;
  const endMs = performance.now() + durationMs;
  const stray = new StrayErrors();
  let slowestMs = 0;
  let firstBytes = 0;
  let index = onlyCase ?? 0;
  let caseCount = 0;
  let failure: FuzzFailure | undefined;
  try {
    for (; caseCount < cases && (caseCount < minCases || performance.now() < endMs); index++) {
      onCase?.(index);
      const input = target.generate(caseRandom(seed, index));
      const startedMs = performance.now();
      let thrown = await attempt(target, input, stray);
      const tookMs = performance.now() - startedMs;
      slowestMs = Math.max(slowestMs, tookMs);
      if (thrown === undefined && caseCount % MEMORY_LOOK_CASES === 0) {
        if (caseCount <= WARM_UP_CASES) firstBytes = liveBytes();
        // The heap is let grow for its own reasons; only what a collection cannot free counts.
        else if (process.memoryUsage.rss() > MAX_GROWTH_BYTES + firstBytes) {
          const grownBytes = liveBytes() - firstBytes;
          if (grownBytes > MAX_GROWTH_BYTES) {
            thrown = new Error(`memory in use grew by ${grownBytes} bytes in ${caseCount} cases`);
          }
        }
      }
      caseCount++;
      if (thrown !== undefined) {
        const smallest = await shrink(target, input, thrown, stray);
        failure = describe(index, smallest.thrown, target.show(smallest.input));
        break;
      }
      if (onlyCase !== undefined) break;
      // Rejections that nobody handles are told between turns of the loop.
      if (caseCount % 64 === 0) await new Promise((resolve) => setImmediate(resolve));
    }
    await new Promise((resolve) => setImmediate(resolve));
    const left = stray.take();
    if (failure === undefined && left !== undefined) failure = describe(index, left, "(after the last case)");
  } finally {
    stray.close();
  }
  return { name: target.name, seed, caseCount, slowestMs, failure };
}

async function attempt<Input>(target: FuzzTarget<Input>, input: Input, stray: StrayErrors): Promise<unknown> {
  const startedMs = performance.now();
  const before = process.threadCpuUsage();
  try {
    await target.run(input);
  } catch (thrown) {
    return thrown;
  }
  const tookMs = performance.now() - startedMs;
  const { user, system } = process.threadCpuUsage(before);
  if (user + system > MAX_CPU_MS * 1_000) {
    return new Error(`took longer than ${MAX_CPU_MS} ms of CPU`, { cause: `${user + system} us` });
  }
  if (tookMs > MAX_CASE_MS) return new Error(`took longer than ${MAX_CASE_MS} ms`, { cause: `${tookMs} ms` });
  return stray.take();
}

async function shrink<Input>(
  target: FuzzTarget<Input>,
  input: Input,
  thrown: unknown,
  stray: StrayErrors,
): Promise<{ input: Input; thrown: unknown }> {
  const wanted = kindOf(thrown);
  const endMs = performance.now() + MAX_SHRINK_MS;
  let best = { input, thrown };
  for (let isSmaller = true; isSmaller && performance.now() < endMs;) {
    isSmaller = false;
    for (const candidate of target.smaller(best.input)) {
      if (performance.now() > endMs) break;
      const again = await attempt(target, candidate, stray);
      if (again === undefined || kindOf(again) !== wanted) continue;
      best = { input: candidate, thrown: again };
      isSmaller = true;
      break;
    }
  }
  return best;
}

/** Failures with the same first words and the same place count as one. */
function kindOf(thrown: unknown): string {
  if (!(thrown instanceof Error)) return String(thrown);
  const place = /\bat .*\(?(\S+:\d+):\d+\)?/.exec(thrown.stack ?? "")?.[1] ?? "";
  return `${thrown.name} ${thrown.message.replaceAll(/\d+/g, "#").slice(0, 40)} ${place}`;
}

function describe(caseIndex: number, thrown: unknown, input: string): FuzzFailure {
  const message = thrown instanceof Error ? `${thrown.name}: ${thrown.message}` : String(thrown);
  return { caseIndex, message, stack: thrown instanceof Error ? (thrown.stack ?? "") : "", input };
}

/** What reaches the process instead of a caller. */
class StrayErrors {
  #first: unknown;
  #has = false;
  readonly #onStray = (thrown: unknown): void => {
    if (this.#has) return;
    this.#has = true;
    this.#first = thrown;
  };

  constructor() {
    process.on("unhandledRejection", this.#onStray);
    process.on("uncaughtException", this.#onStray);
  }

  take(): unknown {
    if (!this.#has) return undefined;
    this.#has = false;
    const text = this.#first instanceof Error ? (this.#first.stack ?? this.#first.message) : String(this.#first);
    return new Error(`reached the process: ${text}`);
  }

  close(): void {
    process.off("unhandledRejection", this.#onStray);
    process.off("uncaughtException", this.#onStray);
  }
}

/** What to print of a failure. */
export function failureText({ name, seed, failure }: FuzzReport): string {
  if (failure === undefined) return "";
  return [
    `${name}: ${failure.message}`,
    failure.stack.split("\n").slice(1, 8).join("\n"),
    `smallest input: ${failure.input}`,
    `again: npm run fuzz -- --target=${name} --seed=${seed} --case=${failure.caseIndex}`,
  ].join("\n");
}
