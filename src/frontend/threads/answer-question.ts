import type { Metrics } from "../../observability/index.ts";
import type { LiveRequests } from "../live-requests.ts";
import type { ModelRegistry } from "../model-registry.ts";
import { cancelLive } from "../requests-api.ts";
import type { Answer, ExplainedRequest, Question } from "./messages.ts";

/** What this thread has to say to a question of another one. */
export async function answerQuestion(
  question: Question,
  { models, live, metrics }: { models: ModelRegistry; live: LiveRequests; metrics: Metrics },
): Promise<Answer> {
  switch (question.type) {
    case "metrics":
      return { type: "metrics", snapshot: await metrics.snapshot() };
    case "explain":
      return { type: "explain", explained: await explainRequest(models, question.requestId) };
    case "live-requests":
      return { type: "live-requests", total: live.size, requests: live.view(question.limit) };
    case "cancel-request":
      return { type: "cancel-request", count: cancelLive(live, question.id) };
    case "busy-thresholds":
      models.setBusyThresholds(question.model, question.thresholds);
      return { type: "done" };
  }
}

/** The decisions that this thread, or the router service it asks, keeps of a request. */
export async function explainRequest(models: ModelRegistry, requestId: string): Promise<ExplainedRequest | undefined> {
  for (const model of models.all()) {
    const decisions = (await model.remote?.explainFully(requestId)) ?? model.router.explain(requestId);
    if (decisions.length === 0) continue;
    const disaggregation = model.splits.find(requestId);
    return { model: model.name, decisions, ...(disaggregation.length === 0 ? {} : { disaggregation }) };
  }
  return undefined;
}
