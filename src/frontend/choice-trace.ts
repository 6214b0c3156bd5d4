import type { Span } from "../observability/index.ts";
import type { DecisionExplanation, RoutingDecision } from "../router/index.ts";

/**
 * The spans of one choice's attempts: `route`, until a worker was chosen, and `decode`, from there to the end of the
 * attempt. Both end together with the attempt, so that `route` can say what the decision was worth: the candidates' cost
 * and overlap as they were, and what the engine really reused. Made only when traces are exported.
 */
export class ChoiceTrace {
  readonly #parent: Span;
  #route: Span | undefined;
  #decode: Span | undefined;
  #decision: RoutingDecision | undefined;
  #routedMs = 0;

  constructor(parent: Span) {
    this.#parent = parent;
  }

  routing(startMs: number): void {
    this.#route = this.#parent.child("route", { startMs });
  }

  /** Returns the trace context for the worker. */
  routed(decision: RoutingDecision, atMs: number): string {
    this.#decision = decision;
    this.#routedMs = atMs;
    this.#decode = this.#parent.child("decode", {
      kind: "client",
      startMs: atMs,
      attributes: { "dynamo.worker.instance_id": decision.instanceId, "dynamo.worker.dp_rank": decision.dpRank },
    });
    return this.#decode.traceparent;
  }

  firstToken(cachedTokens: number, atMs: number): void {
    this.#decode?.event("first_token", atMs);
    this.#decode?.set({ "dynamo.cached_tokens": cachedTokens });
  }

  /** The attempt is over and its decision released; does nothing when that was told already. */
  ended(outcome: string, outputTokens: number, atMs: number): void {
    const [route, decode, decision] = [this.#route, this.#decode, this.#decision];
    this.#route = this.#decode = this.#decision = undefined;
    const failed = outcome !== "finished";
    if (decode !== undefined) {
      decode.set({ "dynamo.output_tokens": outputTokens, "dynamo.outcome": outcome });
      if (failed) decode.fail(outcome);
      decode.end(atMs);
    }
    if (route === undefined) return;
    if (decision === undefined) {
      if (failed) route.fail(outcome);
      route.end(atMs);
      return;
    }
    const explanation = route.isRecording ? decision.explain() : undefined;
    if (explanation !== undefined) route.set(attributesOf(explanation));
    route.end(this.#routedMs);
  }
}

function attributesOf(explanation: DecisionExplanation): Parameters<Span["set"]>[0] {
  const { candidates, worker, prompt, predicted, actual, left_out: leftOut } = explanation;
  const chosen = candidates.find((candidate) => candidate.chosen);
  return {
    "dynamo.route.policy": explanation.policy,
    "dynamo.route.reason": explanation.reason,
    "dynamo.worker.instance_id": worker.instance_id,
    "dynamo.worker.dp_rank": worker.dp_rank,
    "dynamo.route.candidates": candidates.length,
    "dynamo.route.left_out": leftOut.already_tried + leftOut.not_allowed + leftOut.inhibited + leftOut.busy,
    "dynamo.route.degradations": explanation.degradations,
    "dynamo.route.queued_ms": explanation.queued_ms,
    "dynamo.route.prompt_tokens": prompt.tokens,
    "dynamo.route.prompt_blocks": prompt.blocks,
    "dynamo.route.predicted_cached_tokens": predicted.cached_tokens,
    ...(chosen === undefined
      ? {}
      : {
          "dynamo.route.cost": chosen.cost.total,
          "dynamo.route.cost_best": Math.min(...candidates.map((candidate) => candidate.cost.total)),
          "dynamo.route.overlap_blocks.device": chosen.overlap_blocks.device,
          "dynamo.route.overlap_blocks.host": chosen.overlap_blocks.host,
          "dynamo.route.overlap_blocks.disk": chosen.overlap_blocks.disk,
          "dynamo.route.overlap_blocks.shared": chosen.overlap_blocks.shared,
          "dynamo.route.load.active_requests": chosen.load.active_requests,
          "dynamo.route.load.prefill_tokens": chosen.load.prefill_tokens,
          "dynamo.route.load.decode_blocks": chosen.load.decode_blocks,
        }),
    ...(actual === null ? {} : { "dynamo.route.reused_tokens": actual.cached_tokens }),
  };
}
