import assert from "node:assert/strict";
import {
  MockScheduler,
  Sequence,
  checkMockerConfig,
  mockerConfig,
  schedulerConfig,
  type SequenceEnd,
} from "../engines/mocker/index.ts";
import type { MockerEngineConfig } from "../engines/index.ts";
import { DynamoError, toDynamoError } from "../errors/index.ts";
import { Metrics } from "../observability/index.ts";
import { polynomialTiming, withSpeedup } from "../perf-model/index.ts";
import type { KvEvent } from "../protocol/index.ts";
import { FlatKvIndex, type KvIndex } from "../router/indexer/index.ts";
import { Router, type RoutingDecision, type WaitingRoute } from "../router/index.ts";
import { SeededRandom, VirtualClock, type Random } from "../std/index.ts";
import { blockHashSeed } from "../tokens/index.ts";
import { firstPrompt, nextPrompt } from "./prompt-source.ts";
import { ReplayCollector } from "./replay-collector.ts";
import { ON_SCHEDULE, type ReplayOptions } from "./replay-options.ts";
import type { ReplayReport } from "./replay-report.ts";
import { ReplayRank } from "./replay-worker.ts";
import type { Trace, TraceSession } from "./trace.ts";

/**
 * Runs a trace through the real router (policy, cost function, KV index, queue) and mock engines on one virtual clock, as
 * fast as this machine computes: a discrete-event simulation. Nothing sleeps and nothing is random but what `seed` draws.
 * Left out: the network, the frontend and several routers.
 *
 * Throws `invalid-config`, and `cancelled` when the signal aborts. Cost: about 1 us per pass and 0.1 us per token.
 */
export async function runReplay(trace: Trace, options: ReplayOptions): Promise<ReplayReport> {
  return new Replay(trace, options).run();
}

/** A request from its arrival to its end. */
interface LiveRequest {
  readonly session: number;
  readonly turn: number;
  readonly arrivalMs: number;
  readonly prompt: Uint32Array;
  /** Kept only when another turn follows. */
  readonly answer: number[] | undefined;
  decision: RoutingDecision | undefined;
  rank: ReplayRank | undefined;
}

/** Events between two looks at the signal and two turns of the real event loop. */
const EVENTS_PER_BREATH = 50_000;

class Replay {
  readonly #options: ReplayOptions;
  readonly #engine: MockerEngineConfig;
  readonly #sessions: readonly TraceSession[];
  /** Session numbers by arrival. */
  readonly #order: readonly number[];
  readonly #arrivalMs: Float64Array;
  readonly #clock = new VirtualClock();
  readonly #router: Router;
  readonly #index: KvIndex | undefined;
  readonly #workers = new Map<string, readonly ReplayRank[]>();
  readonly #collector: ReplayCollector;
  readonly #requests: (LiveRequest | undefined)[] = [];
  readonly #hashSeed = blockHashSeed();
  #nextSession = 0;
  #activeSessions = 0;
  #waitingRoutes = 0;

  constructor(trace: Trace, options: ReplayOptions) {
    this.#options = options;
    this.#engine = mockerConfig(options.engine ?? {});
    checkOptions(options);
    checkMockerConfig(this.#engine);
    this.#sessions = options.maxSessions === undefined ? trace.sessions : trace.sessions.slice(0, options.maxSessions);
    const random = new SeededRandom(options.seed ?? 1);
    this.#arrivalMs = arrivalTimes(this.#sessions, options, random);
    this.#order = [...this.#arrivalMs.keys()].sort((a, b) => this.#arrivalMs[a]! - this.#arrivalMs[b]!);
    this.#collector = new ReplayCollector(this.#engine.blockSizeTokens);
    const { policy } = options;
    if (policy.usesOverlap === true) this.#index = new FlatKvIndex({ random });
    this.#router = new Router({
      model: trace.name,
      policy,
      clock: this.#clock,
      random,
      metrics: new Metrics(),
      blockSizeTokens: this.#engine.blockSizeTokens,
      ...(options.router === undefined ? {} : { config: options.router }),
      ...(this.#index === undefined ? {} : { index: this.#index }),
    });
    for (let worker = 0; worker < options.workers; worker++) this.#addWorker(worker);
  }

  async run(): Promise<ReplayReport> {
    const { signal, arrivals = ON_SCHEDULE } = this.#options;
    if (arrivals.kind === "schedule") this.#scheduleNextArrival();
    else this.#fillUp(arrivals.sessions);
    this.#clock.setTimer(0, this.#reportLoads);
    for (let events = 0; this.#isUnfinished(); events++) {
      assert(this.#clock.runNext(), "while requests are unfinished something is due");
      // A request that the router's queue lets go is told so by a promise.
      if (this.#waitingRoutes > 0) await Promise.resolve();
      if (events % EVENTS_PER_BREATH === 0) {
        await new Promise<void>((resolve) => setImmediate(resolve));
        if (signal?.aborted === true) throw new DynamoError("cancelled", "the replay was cancelled");
      }
    }
    const ranks = [...this.#workers].map(([instanceId, list]) => ({ instanceId, ranks: list }));
    return this.#collector.report(this.#options.policy, this.#clock.monotonicMs(), ranks);
  }

  #isUnfinished(): boolean {
    return this.#activeSessions > 0 || this.#nextSession < this.#sessions.length;
  }

  #addWorker(number: number): void {
    // As discovery would name it.
    const instanceId = (number + 1).toString(16).padStart(16, "0");
    const { maxSequences, maxBatchedTokens, totalBlocks, dataParallelSize } = this.#engine;
    this.#router.addWorker(instanceId, `replay://${number}`, {
      dataParallelSize,
      capacity: { maxSequences, maxBatchedTokens, totalBlocks },
    });
    const timing = withSpeedup(this.#options.timing ?? polynomialTiming, this.#engine);
    const ranks = Array.from({ length: dataParallelSize }, (_, dpRank) => {
      const rank: ReplayRank = new ReplayRank({
        clock: this.#clock,
        scheduler: new MockScheduler(schedulerConfig(this.#engine, dpRank, timing)),
        observer: { onOutput: (sequence, tokenId, end) => this.#onOutput(sequence, tokenId, end) },
        onKvEvents: (events) => this.#onKvEvents(instanceId, dpRank, events),
      });
      return rank;
    });
    this.#workers.set(instanceId, ranks);
  }

  // ---- Arrivals ----

  #scheduleNextArrival(): void {
    const session = this.#order[this.#nextSession];
    if (session === undefined) return;
    this.#clock.setTimer(this.#arrivalMs[session]! - this.#clock.monotonicMs(), () => {
      this.#startSession();
      this.#scheduleNextArrival();
    });
  }

  #fillUp(most: number): void {
    while (this.#activeSessions < most && this.#nextSession < this.#sessions.length) this.#startSession();
  }

  #startSession(): void {
    const number = this.#order[this.#nextSession++]!;
    const { start, turns } = this.#sessions[number]!;
    this.#activeSessions++;
    this.#startTurn(number, 0, firstPrompt(start, number, turns[0]!.newTokens));
  }

  #startTurn(session: number, turn: number, prompt: Uint32Array): void {
    const { turns } = this.#sessions[session]!;
    const id = this.#requests.length;
    const answer: number[] | undefined = turn + 1 < turns.length ? [] : undefined;
    const arrivalMs = this.#clock.monotonicMs();
    const request: LiveRequest = { session, turn, arrivalMs, prompt, answer, decision: undefined, rank: undefined };
    this.#requests.push(request);
    this.#collector.arrived();
    const outputTokens = turns[turn]!.outputTokens;
    if (prompt.length + outputTokens > this.#engine.contextLength) {
      this.#refuse(id, "context-length");
      return;
    }
    this.#route(id, request, outputTokens);
  }

  #route(id: number, request: LiveRequest, outputTokens: number): void {
    let routed: RoutingDecision | WaitingRoute;
    try {
      routed = this.#router.routeWhenReady({ tokenIds: request.prompt, requestId: String(id) });
    } catch (thrown) {
      this.#refuse(id, toDynamoError(thrown).reason);
      return;
    }
    if (!("decision" in routed)) {
      this.#submit(id, request, outputTokens, routed);
      return;
    }
    this.#waitingRoutes++;
    routed.decision.then(
      (decision) => {
        this.#waitingRoutes--;
        this.#submit(id, request, outputTokens, decision);
      },
      (thrown: unknown) => {
        this.#waitingRoutes--;
        this.#refuse(id, toDynamoError(thrown).reason);
      },
    );
  }

  #submit(id: number, request: LiveRequest, outputTokens: number, decision: RoutingDecision): void {
    const rank = this.#workers.get(decision.instanceId)![decision.dpRank]!;
    request.decision = decision;
    request.rank = rank;
    rank.submit(
      new Sequence({
        id,
        tokenIds: request.prompt,
        maxTokens: outputTokens,
        hashSeed: this.#hashSeed,
        blockSizeTokens: this.#engine.blockSizeTokens,
        vocabularySize: this.#engine.vocabularySize,
        arrivedMs: this.#clock.monotonicMs(),
      }),
    );
  }

  // ---- What the engines tell ----

  #onOutput(sequence: Sequence, tokenId: number, end: SequenceEnd | undefined): void {
    const request = this.#requests[sequence.id]!;
    const decision = request.decision!;
    const nowMs = this.#clock.monotonicMs();
    if (sequence.lastTokenMs < 0) {
      decision.firstToken(sequence.cachedTokens);
      request.rank!.computedTokens += sequence.promptTokens - sequence.cachedTokens;
      this.#collector.firstToken(sequence, decision, request.arrivalMs, nowMs);
    } else {
      this.#collector.nextToken(nowMs - sequence.lastTokenMs);
    }
    if (tokenId >= 0) {
      decision.addTokens(1);
      request.answer?.push(tokenId);
    }
    if (end === undefined) return;
    decision.release();
    this.#collector.ended(sequence, request.arrivalMs, nowMs);
    this.#endRequest(sequence.id);
  }

  #onKvEvents(instanceId: string, dpRank: number, events: readonly KvEvent[]): void {
    const index = this.#index;
    if (index === undefined) return;
    const apply = (): void => {
      const rank = index.rankOf(instanceId, dpRank);
      for (const event of events) if (index.apply(rank, event) !== "ok") this.#collector.eventsNotApplied++;
    };
    const delayMs = this.#options.eventDelayMs ?? 1;
    if (delayMs === 0) apply();
    else this.#clock.setTimer(delayMs, apply);
  }

  readonly #reportLoads = (): void => {
    for (const [instanceId, ranks] of this.#workers) {
      // A worker reports the sum of its ranks; with one, as usual, its own.
      if (ranks.length === 1) this.#router.updateLoad(instanceId, ranks[0]!.load());
    }
    this.#clock.setTimer(this.#options.loadIntervalMs ?? 250, this.#reportLoads);
  };

  // ---- Ends ----

  #refuse(id: number, reason: string): void {
    this.#collector.refused(reason);
    this.#requests[id] = undefined;
    this.#endSession();
  }

  #endRequest(id: number): void {
    const { session, turn, prompt, answer } = this.#requests[id]!;
    this.#requests[id] = undefined;
    const next = this.#sessions[session]!.turns[turn + 1];
    if (next === undefined) {
      this.#endSession();
      return;
    }
    this.#clock.setTimer(next.delayMs, () => {
      this.#startTurn(session, turn + 1, nextPrompt(prompt, answer!, next.newTokens, session, turn + 1));
    });
  }

  #endSession(): void {
    this.#activeSessions--;
    const { arrivals = ON_SCHEDULE } = this.#options;
    // Not from inside a scheduler's call.
    if (arrivals.kind === "concurrency") this.#clock.setTimer(0, () => this.#fillUp(arrivals.sessions));
  }
}

/** Length = sessions: when each arrives, after smear and speed-up. */
export function arrivalTimes(
  sessions: readonly TraceSession[],
  options: Pick<ReplayOptions, "arrivals" | "smearMs">,
  random: Random,
): Float64Array {
  const { arrivals = ON_SCHEDULE, smearMs = 0 } = options;
  const speedup = arrivals.kind === "schedule" ? arrivals.speedup : 1;
  return Float64Array.from(sessions, ({ arrivalMs }) => (arrivalMs + random.nextFloat() * smearMs) / speedup);
}

function checkOptions({
  workers,
  arrivals = ON_SCHEDULE,
  smearMs = 0,
  eventDelayMs = 0,
  loadIntervalMs = 250,
  maxSessions = 1,
}: ReplayOptions): void {
  const problems: string[] = [];
  if (!Number.isInteger(workers) || workers < 1 || workers > 4_096) {
    problems.push(`workers: expected a whole number from 1 to 4096, got ${workers}`);
  }
  if (!Number.isInteger(maxSessions) || maxSessions < 1) {
    problems.push(`sessions: expected a whole number of at least 1, got ${maxSessions}`);
  }
  if (arrivals.kind === "schedule" && !(arrivals.speedup > 0 && Number.isFinite(arrivals.speedup))) {
    problems.push(`arrival speedup: expected more than 0, got ${arrivals.speedup}`);
  }
  if (arrivals.kind === "concurrency" && !(Number.isInteger(arrivals.sessions) && arrivals.sessions > 0)) {
    problems.push(`concurrency: expected a whole number of at least 1, got ${arrivals.sessions}`);
  }
  if (!(smearMs >= 0)) problems.push(`smear: expected at least 0, got ${smearMs}`);
  if (!(eventDelayMs >= 0)) problems.push(`event delay: expected at least 0, got ${eventDelayMs}`);
  if (!(loadIntervalMs > 0)) problems.push(`load interval: expected more than 0, got ${loadIntervalMs}`);
  if (problems.length > 0) throw new DynamoError("invalid-config", problems.join("\n"));
}
