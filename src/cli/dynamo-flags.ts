/**
 * Flags of Dynamo's frontend, router and mocker that are no options here, each with the reason: a script that was written
 * for Dynamo learns which line to change and why. `ignored` ones change nothing that a client could see, so they cost one
 * line of warning; all others are refused, as somebody counts on what they do. `docs/environment.md` lists both.
 */
export interface DynamoFlag {
  readonly why: string;
  /** @default false: refused */
  readonly ignored?: true;
}

const IN_CARD = "the workers' model cards say it";
const OWN_PROCESSOR = "there is one chat processor, of the frontend's own";
const NO_IMAGES = "only text is served";
const NO_CLASSES = "there are no policy classes: --router-queue-policy orders one queue";
const ONE_INDEX = "the index is in the frontend, or in dynamo router with --router-service";
const NO_AIC = "times come from --planner-profile-data or the built-in polynomials";

export const DYNAMO_FLAGS: Readonly<Record<string, DynamoFlag>> = {
  // Frontend.
  "admission-control": { why: "Dynamo ignores it too; each busy threshold switches its own check on", ignored: true },
  "namespace-prefix": { why: "a frontend serves the workers of one --namespace" },
  "tls-cert-path": { why: "put a proxy that ends TLS in front" },
  "tls-key-path": { why: "put a proxy that ends TLS in front" },
  "metrics-prefix": { why: "metrics have Dynamo's names" },
  "dump-config-to": { why: "the configuration is printed at the start, with where each value comes from" },
  "rejection-frontend-request-concurrency-limit": { why: "use --max-concurrent-requests, of all models together" },
  "rejection-frontend-runtime-task-limit": { why: "there is no task runtime; use --max-concurrent-requests" },
  "rejection-frontend-request-plane-connection-limit": { why: "one connection to each worker carries all requests" },
  "kserve-grpc-server": { why: "the API is OpenAI's over HTTP" },
  "grpc-metrics-port": { why: "there is no gRPC server; metrics are on --http-port" },
  "dyn-chat-processor": { why: OWN_PROCESSOR },
  "dyn-preprocess-workers": { why: "long prompts are tokenized in slices; use --frontend-threads for more cores" },
  "dyn-debug-perf": { why: "the log line of each request has the time at every step" },
  tokenizer: { why: "the workers bring the model's tokenizer along" },
  "tokenizer-fallback": {
    why: "a tokenizer that is no byte-level BPE is loaded by the library for all kinds by itself",
  },
  "trust-remote-code": { why: "code of a model is never run" },
  "enable-anthropic-api": { why: "the API is OpenAI's" },
  "strip-anthropic-preamble": { why: "the API is OpenAI's" },
  "enable-streaming-tool-dispatch": { why: "tool calls are not parsed" },
  "enable-streaming-reasoning-dispatch": { why: "reasoning is not parsed" },
  "exclude-tools-when-tool-choice-none": { why: "tool calls are not parsed" },
  "frontend-route-extension": { why: "Python is not loaded" },
  interactive: { why: "use any OpenAI client" },
  // Router.
  "router-event-threads": { why: "one thread writes the index", ignored: true },
  "router-snapshot-threshold": { why: "workers are asked for what they hold, no snapshots are kept", ignored: true },
  "router-reset-states": { why: "nothing outlives a router", ignored: true },
  "router-prune-target-ratio": { why: "own decisions are pruned to 80 %", ignored: true },
  "router-max-tree-size": { why: "own decisions are bounded to 1,048,576 blocks", ignored: true },
  "router-min-initial-workers": { why: "the frontend serves as soon as it has one worker" },
  "load-aware": { why: "use --router-mode=least-loaded" },
  "decode-fallback": { why: "what prefill workers cannot do, decode workers always do", ignored: true },
  "enforce-disagg": { why: "use --disagg=always; a request without a prefill worker is still answered" },
  "router-conditional-disagg": { why: "--disagg=auto is the default", ignored: true },
  "router-prefill-policy": { why: "both pools are routed by --router-mode" },
  "router-decode-policy": { why: "both pools are routed by --router-mode" },
  "shared-cache-type": { why: "workers tell what they find in the store of --kv-s3" },
  "router-policy-config": { why: NO_CLASSES },
  "router-session-affinity-mode": { why: "a session leaves its worker only when that cannot take it (soft)" },
  "use-remote-indexer": { why: ONE_INDEX },
  "serve-indexer": { why: ONE_INDEX },
  "router-prefill-load-model": { why: NO_AIC },
  "router-tracking-hash": { why: "blocks are named by the public hash" },
  // Workers.
  endpoint: { why: "use --namespace and --component; the endpoint is generate" },
  "endpoint-types": { why: IN_CARD },
  connector: { why: "KV blocks move over the transfer plane, see --transfer-backend" },
  "dyn-tool-call-parser": { why: "tool calls are not parsed" },
  "dyn-reasoning-parser": { why: "reasoning is not parsed" },
  "dyn-enable-structural-tag": { why: "tool calls are not parsed" },
  "health-check-payload": { why: "the canary sends one token" },
  "multimodal-embedding-cache-capacity-gb": { why: NO_IMAGES },
  "output-modalities": { why: NO_IMAGES },
  "media-output-fs-url": { why: NO_IMAGES },
  "media-output-http-url": { why: NO_IMAGES },
  // Mocker.
  "durable-kv-events": { why: "deprecated in Dynamo; workers keep their newest events and are asked", ignored: true },
  "zmq-kv-events-ports": { why: "mock workers publish KV events on the event plane" },
  "zmq-replay-ports": { why: "mock workers answer for lost KV events on the request plane" },
  "bootstrap-ports": { why: "handoffs need no port of their own", ignored: true },
  "kv-bytes-per-token": { why: 'give it in --extra-engine-args: {"kv_bytes_per_token": 131072}' },
  "aic-perf-model": { why: NO_AIC },
};

/** `--aic-system` and its like are many. */
export function dynamoFlag(name: string): DynamoFlag | undefined {
  if (Object.hasOwn(DYNAMO_FLAGS, name)) return DYNAMO_FLAGS[name];
  const positive = name.startsWith("no-") ? name.slice(3) : name;
  if (Object.hasOwn(DYNAMO_FLAGS, positive)) return DYNAMO_FLAGS[positive];
  return /^aic-[a-z-]+$/.test(name) ? DYNAMO_FLAGS["aic-perf-model"] : undefined;
}
