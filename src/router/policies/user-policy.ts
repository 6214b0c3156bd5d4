import { DynamoError } from "../../errors/index.ts";
import { EMPTY_LOAD } from "../../protocol/index.ts";
import { SeededRandom } from "../../std/index.ts";
import { DEFAULT_ROUTER_CONFIG } from "../config.ts";
import { CandidateColumns, computeCosts } from "../scheduling/cost.ts";
import type { PolicyChoice, RoutingPolicy, RoutingSnapshot, WorkerCandidate } from "./base.ts";

/**
 * A policy that somebody else wrote, as the router takes it: its form is checked and it makes a few decisions before
 * anything is served, and every later choice is checked too. One that throws, or chooses nobody, fails that request with
 * its own name in the diagnostic, and nothing else.
 */
const NAME = /^[a-z][a-z0-9-]{0,63}$/;
const MAX_REASON = 200;

/** Throws `invalid-config` with what is wrong. */
export function userPolicy(exported: unknown): RoutingPolicy {
  if (typeof exported !== "object" || exported === null) {
    throw invalid(`expected an object { name, choose(snapshot) }, got ${exported === null ? "null" : typeof exported}`);
  }
  const { name, choose, usesOverlap } = exported as Record<string, unknown>;
  if (typeof name !== "string" || !NAME.test(name)) {
    throw invalid(`name: expected lower-case letters, digits and dashes, got ${JSON.stringify(name) ?? "nothing"}`);
  }
  if (typeof choose !== "function") throw invalid(`choose: expected a function, got ${typeof choose}`);
  if (usesOverlap !== undefined && typeof usesOverlap !== "boolean") {
    throw invalid(`usesOverlap: expected true or false, got ${typeof usesOverlap}`);
  }
  const own = exported as RoutingPolicy;
  const policy: RoutingPolicy = {
    name,
    ...(usesOverlap === undefined ? {} : { usesOverlap }),
    choose: (snapshot) => checkedChoice(name, snapshot, () => own.choose(snapshot)),
  };
  for (const candidateCount of [1, 2, 5]) {
    try {
      policy.choose(trial(candidateCount));
    } catch (thrown) {
      const why = thrown instanceof DynamoError ? thrown.diagnostic : String(thrown);
      throw invalid(`choose, tried with ${candidateCount} candidates: ${why}`);
    }
  }
  return policy;
}

function checkedChoice(name: string, { candidates }: RoutingSnapshot, choose: () => PolicyChoice): PolicyChoice {
  let choice: PolicyChoice;
  try {
    choice = choose();
  } catch (cause) {
    throw failed(name, `it threw ${String(cause)}`, cause);
  }
  const index: unknown = choice?.index;
  if (!Number.isInteger(index) || (index as number) < 0 || (index as number) >= candidates.length) {
    throw failed(name, `index: expected a whole number from 0 to ${candidates.length - 1}, got ${String(index)}`);
  }
  return { index: choice.index, reason: String(choice.reason ?? name).slice(0, MAX_REASON) };
}

function failed(name: string, why: string, cause?: unknown): DynamoError {
  return new DynamoError("internal", "the routing policy failed", { diagnostic: `policy ${name}: ${why}`, cause });
}

function invalid(why: string): DynamoError {
  return new DynamoError("invalid-config", why);
}

/** Idle workers, each with one block more of the prompt than the one before. */
function trial(candidateCount: number): RoutingSnapshot {
  const prompt = { tokens: 160, blocks: 10, blockSizeTokens: 16 };
  const columns = new CandidateColumns();
  columns.resize(candidateCount);
  for (const name of ["device", "host", "disk", "shared", "prefillTokens", "decodeBlocks", "activeRequests"] as const) {
    columns[name].fill(0);
  }
  columns.multiplier.fill(1);
  const candidates = Array.from({ length: candidateCount }, (_, i): WorkerCandidate => {
    columns.device[i] = i;
    columns.decodeBlocks[i] = prompt.blocks;
    return {
      instanceId: i.toString(16).padStart(16, "0"),
      address: "memory://trial",
      dpRank: 0,
      activeRequests: 0,
      reportedLoad: EMPTY_LOAD,
      capacity: { maxSequences: 64, maxBatchedTokens: 8_192, totalBlocks: 10_000 },
    };
  });
  computeCosts(columns, prompt, DEFAULT_ROUTER_CONFIG);
  return { candidates, columns, prompt, settings: DEFAULT_ROUTER_CONFIG, turn: 0, random: new SeededRandom(1) };
}
