import type { TSchema } from "typebox";
import type { FrontendLimits } from "../config.ts";
import {
  busyThresholdsSchema,
  chatAnswerSchema,
  chatChunkSchema,
  chatRequestSchema,
  completionAnswerSchema,
  completionChunkSchema,
  completionRequestSchema,
  errorSchema,
  healthSchema,
  modelListSchema,
} from "./schemas.ts";

/** The OpenAPI 3.1 document of the frontend's HTTP interface; pure data, built from `schemas.ts`. */
export interface OpenApiDocument {
  readonly openapi: "3.1.0";
  readonly info: { readonly title: string; readonly version: string; readonly description: string };
  readonly paths: Readonly<Record<string, Readonly<Record<string, unknown>>>>;
  readonly components: { readonly schemas: Readonly<Record<string, TSchema>> };
}

const ref = (name: string): object => ({ $ref: `#/components/schemas/${name}` });
const json = (schema: object): object => ({ "application/json": { schema } });
const answer = (description: string, content: object): object => ({ description, content });

/** What a POST can fail with besides 500, and when. */
const FAILURES: Readonly<Record<string, string>> = {
  "400": "The body is not valid, names fields we do not know, or is longer than the model's context.",
  "404": "No model of that name is being served.",
  "408": "The body did not arrive in time.",
  "413": "The body is larger than the limit.",
  "415": "The body is not JSON.",
  "500": "A defect of the server.",
  "501": "A known OpenAI field has a value that is not served.",
  "503": "No worker serves the model now, or the server is shutting down.",
  "504": "The request did not finish before its deadline.",
  "529": "The server is at capacity; retry after the seconds in retry-after.",
};

export function openApiDocument(limits: FrontendLimits, version: string): OpenApiDocument {
  return {
    openapi: "3.1.0",
    info: {
      title: "Dynamo frontend",
      version,
      description: "OpenAI-compatible inference API with vLLM's extra sampling fields. Unknown fields are refused.",
    },
    paths: {
      "/v1/chat/completions": {
        post: generation("createChatCompletion", "Answer a conversation", "ChatRequest", "ChatAnswer", "ChatChunk"),
      },
      "/v1/completions": {
        post: generation("createCompletion", "Continue a text", "CompletionRequest", "Completion", "CompletionChunk"),
      },
      "/v1/models": { get: reading("listModels", "Models that are served now", json(ref("ModelList"))) },
      "/v1/route": {
        post: operators(
          "previewRoute",
          "Where the prompt of a chat or completion request would go now; nothing is run",
          { requestBody: { required: true, content: json({ anyOf: [ref("ChatRequest"), ref("CompletionRequest")] }) } },
        ),
      },
      "/v1/route/explain/{request_id}": {
        get: operators("explainRoute", "Why a request went where it went, and what its engine reused", {
          parameters: [{ name: "request_id", in: "path", required: true, schema: { type: "string" } }],
        }),
      },
      "/v1/admin/requests": {
        get: operators("liveRequests", "The oldest requests being served, with the stage and the owner of each", {
          parameters: [{ name: "limit", in: "query", schema: { type: "integer", minimum: 1, maximum: 1000 } }],
        }),
      },
      "/v1/admin/requests/{request_id}": {
        delete: operators("cancelRequest", "Ends a request; its client gets an error", {
          parameters: [{ name: "request_id", in: "path", required: true, schema: { type: "string" } }],
        }),
      },
      "/busy_threshold": {
        get: operators("busyThresholds", "When workers count as busy, per model"),
        post: operators("setBusyThresholds", "Sets the thresholds that are named, null = off", {
          requestBody: { required: true, content: json(ref("BusyThresholds")) },
        }),
      },
      "/health": { get: reading("health", "Whether there are workers to serve with", json(ref("Health"))) },
      "/live": { get: reading("live", "Whether the process runs", json({ type: "object" })) },
      "/metrics": { get: reading("metrics", "Prometheus text", { "text/plain": { schema: { type: "string" } } }) },
      "/openapi.json": { get: reading("openapi", "This document", json({ type: "object" })) },
    },
    components: {
      schemas: {
        ChatRequest: chatRequestSchema(limits),
        ChatAnswer: chatAnswerSchema,
        ChatChunk: chatChunkSchema,
        CompletionRequest: completionRequestSchema(limits),
        Completion: completionAnswerSchema,
        CompletionChunk: completionChunkSchema,
        BusyThresholds: busyThresholdsSchema,
        Error: errorSchema,
        ModelList: modelListSchema,
        Health: healthSchema,
      },
    },
  };
}

function generation(operationId: string, summary: string, request: string, whole: string, chunk: string): object {
  const failures = Object.entries(FAILURES).map(([status, when]) => [status, answer(when, json(ref("Error")))]);
  return {
    operationId,
    summary,
    requestBody: { required: true, content: json(ref(request)) },
    responses: {
      "200": {
        description: "The answer; with stream: true a sequence of `data:` events that ends with `data: [DONE]`.",
        content: { ...json(ref(whole)), "text/event-stream": { schema: ref(chunk) } },
      },
      ...Object.fromEntries(failures),
    },
  };
}

/** For operators: others get 404. */
function operators(operationId: string, summary: string, more: object = {}): object {
  return {
    operationId,
    summary,
    description: "For operators: with the admin key, or from this machine when none is set.",
    ...more,
    responses: {
      "200": answer(summary, json({ type: "object" })),
      "404": answer("Not an operator, or nothing of that name.", json(ref("Error"))),
    },
  };
}

function reading(operationId: string, summary: string, content: object): object {
  return { operationId, summary, responses: { "200": answer(summary, content) } };
}
