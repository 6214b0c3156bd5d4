import { tmpdir, userInfo } from "node:os";
import { join } from "node:path";
import { ENGINE_OPTIONS } from "./engine-options.ts";
import { MOCKER_OPTIONS } from "./mocker-options.ts";
import { REPLAY_OPTIONS, REPLAY_VARIANTS } from "./replay-options.ts";

/**
 * Every option of every command, in one table: the command line (`--flag`), the environment (`DYN_...`), the key of a
 * configuration file (the flag without dashes), type, bounds, default, and what it is for. `--help` and
 * `docs/environment.md` come from this table; tests compare them. Names are Dynamo's where it has the option.
 *
 * Limits are bounds on what clients can send; the reason for each number stands beside it.
 */
export const COMMAND_NAMES = [
  "local",
  "frontend",
  "router",
  "worker",
  "vllm",
  "sglang",
  "trtllm",
  "mocker",
  "replay",
  "model",
  "status",
  "requests",
  "disagg",
  "doctor",
] as const;
export type CommandName = (typeof COMMAND_NAMES)[number];

interface OptionBase {
  readonly env: string;
  readonly help: string;
  readonly group: OptionGroup;
  readonly commands: readonly CommandName[];
  /** Other spellings that mean the same, as a flag and, if it has one, as a variable. Accepted silently. */
  readonly also?: readonly { readonly flag: string; readonly env?: string }[];
  /** Shown when the default is not a plain value. */
  readonly defaultText?: string;
}

interface TextOption extends OptionBase {
  readonly type: "text";
  readonly default: string | undefined;
  /** Never printed, and refused on the command line, where other users of the machine could read it. */
  readonly secret?: boolean;
}

interface ChoiceOption extends OptionBase {
  readonly type: "choice";
  readonly choices: readonly string[];
  readonly default: string;
  /** Other words for a choice. */
  readonly synonyms?: Readonly<Record<string, string>>;
}

interface NumberOption extends OptionBase {
  readonly type: "integer" | "number";
  readonly default: number | undefined;
  readonly min: number;
  readonly max: number;
}

interface SwitchOption extends OptionBase {
  readonly type: "switch";
  readonly default: boolean;
}

export type OptionSpec = TextOption | ChoiceOption | NumberOption | SwitchOption;
export type OptionGroup =
  | "Model and engine"
  | "Engine process"
  | "KV tiers"
  | "Replay"
  | "HTTP"
  | "Faults"
  | "Limits"
  | "Routing"
  | "Planes"
  | "Logs"
  | "General";

const ROLES = ["local", "frontend", "router", "worker", "mocker"] as const;
const FRONTENDS = ["local", "frontend"] as const;
const ROUTERS = [...FRONTENDS, "router"] as const;
/** What a replay without a cluster has too. */
const ROUTERS_AND_REPLAY = [...ROUTERS, "replay"] as const;
const WORKERS = ["local", "worker"] as const;

/** Per user, so that two users of one machine neither meet nor get in each other's way. */
export function defaultDiscoveryFolder(): string {
  return join(tmpdir(), `dynamo-ts-${userInfo().uid}`);
}

export const OPTIONS = {
  // ---- Model and engine ----
  model: {
    type: "text",
    default: undefined,
    defaultText:
      "SmolLM2-135M-Instruct; with --engine echo: none, bytes are tokens; mocker: none, bytes are tokens; replay: the only one served",
    env: "DYN_MODEL",
    also: [{ flag: "model-path", env: "DYN_MODEL_PATH" }],
    group: "Model and engine",
    commands: ["local", "worker", "mocker", "replay", "doctor"],
    help: "Model to serve: a name of `dynamo model list`, hf:owner/repository/file.gguf, or the path of a GGUF file.",
  },
  "model-name": {
    type: "text",
    default: undefined,
    defaultText: "the model's own name",
    env: "DYN_MODEL_NAME",
    also: [{ flag: "served-model-name", env: "DYN_SERVED_MODEL_NAME" }],
    group: "Model and engine",
    commands: [...WORKERS, "mocker"],
    help: "The name clients use.",
  },
  "custom-jinja-template": {
    type: "text",
    default: undefined,
    defaultText: "the model's own",
    env: "DYN_CUSTOM_JINJA_TEMPLATE",
    group: "Model and engine",
    commands: [...WORKERS, "mocker"],
    help: "File with a chat template to use instead of the model's own.",
  },
  engine: {
    type: "choice",
    choices: ["llama", "vllm", "sglang", "trtllm", "llama-server", "openai", "echo"],
    default: "llama",
    env: "DYN_ENGINE",
    group: "Model and engine",
    commands: ["local", "worker", "doctor"],
    help: "llama runs the model on this machine's CPU; vllm, sglang, trtllm and llama-server are servers of vLLM, SGLang, TensorRT-LLM and llama.cpp, started by the worker or running already (--engine-url); openai is any server with the OpenAI API that runs already; echo answers with the prompt at once, for measuring and testing.",
  },
  workers: {
    type: "integer",
    default: 2,
    defaultText: "2; with --engine vllm 1; replay: 16",
    min: 1,
    max: 64,
    env: "DYN_WORKERS",
    group: "Model and engine",
    commands: ["local", "replay", "doctor"],
    help: "Worker processes.",
  },
  prefill: {
    type: "integer",
    default: 0,
    min: 0,
    max: 64,
    env: "DYN_PREFILL_WORKERS",
    group: "Model and engine",
    commands: ["local"],
    help: "Workers that only compute prompts and hand their KV blocks to the --decode workers; 0 = none, each of the --workers does both.",
  },
  decode: {
    type: "integer",
    default: 1,
    min: 1,
    max: 64,
    env: "DYN_DECODE_WORKERS",
    group: "Model and engine",
    commands: ["local"],
    help: "With --prefill: workers that go on with the answers, in place of --workers.",
  },
  "disaggregation-mode": {
    type: "choice",
    choices: ["agg", "prefill", "decode"],
    synonyms: { pd: "agg" },
    default: "agg",
    env: "DYN_DISAGGREGATION_MODE",
    group: "Model and engine",
    commands: ["worker", "mocker"],
    help: "agg: the worker does prefill and decode; prefill: it computes prompts and hands their KV blocks over; decode: it fetches them and goes on. It also does whole requests where splitting does not pay.",
  },
  "context-length": {
    type: "integer",
    default: 0,
    min: 0,
    max: 16_777_216,
    defaultText: "0 = what the model was trained for; 8192 with --engine echo; mocker and replay: 131072",
    env: "DYN_CONTEXT_LENGTH",
    also: [{ flag: "max-model-len" }],
    group: "Model and engine",
    commands: [...WORKERS, "mocker", "replay"],
    help: "Longest sequence, prompt and answer together, in tokens.",
  },
  "kv-cache-tokens": {
    type: "integer",
    // 189 MB for SmolLM2-135M (23,040 bytes a token). Attention visits every cell up to the last one in use, cached
    // prefixes too, so a cache that is larger than the load needs slows each step (benchmarks/README.md).
    default: 8_192,
    min: 256,
    max: 1_073_741_824,
    env: "DYN_KV_CACHE_TOKENS",
    group: "Model and engine",
    commands: WORKERS,
    help: "Tokens the KV cache of one worker holds for all its sequences together.",
  },
  "kv-host": {
    type: "text",
    default: undefined,
    defaultText: "none",
    env: "DYN_KVBM_CPU_CACHE_GB",
    group: "KV tiers",
    commands: WORKERS,
    help: "Host memory of one worker for KV blocks that left its cache: 512MB, 1GB; a number alone is in GB.",
  },
  "kv-host-blocks": {
    type: "integer",
    default: 0,
    min: 0,
    max: 1_000_000_000,
    env: "DYN_KVBM_CPU_CACHE_OVERRIDE_NUM_BLOCKS",
    group: "KV tiers",
    commands: WORKERS,
    help: "The same in blocks, in place of --kv-host; 0 = not given.",
  },
  "kv-disk": {
    type: "text",
    default: undefined,
    defaultText: "none",
    env: "DYN_KVBM_DISK_CACHE_GB",
    group: "KV tiers",
    commands: WORKERS,
    help: "Disk space of one worker for KV blocks, which survive a restart; a number alone is in GB.",
  },
  "kv-disk-blocks": {
    type: "integer",
    default: 0,
    min: 0,
    max: 1_000_000_000,
    env: "DYN_KVBM_DISK_CACHE_OVERRIDE_NUM_BLOCKS",
    group: "KV tiers",
    commands: WORKERS,
    help: "The same in blocks, in place of --kv-disk; 0 = not given.",
  },
  "kv-disk-path": {
    type: "text",
    default: undefined,
    defaultText: "a folder of this user in the system's temporary folder",
    env: "DYN_KVBM_DISK_CACHE_DIR",
    group: "KV tiers",
    commands: WORKERS,
    help: "Folder for --kv-disk; workers may share it, each has files of its own in it.",
  },
  "kv-disk-every-block": {
    type: "switch",
    default: false,
    env: "DYN_KVBM_DISABLE_DISK_OFFLOAD_FILTER",
    group: "KV tiers",
    commands: WORKERS,
    help: "Write every block to disk. Otherwise only blocks that were asked for twice, which spares the disk.",
  },
  "kv-s3": {
    type: "text",
    default: undefined,
    defaultText: "none",
    env: "DYN_KV_S3",
    group: "KV tiers",
    commands: WORKERS,
    help: "Store for KV blocks that all workers of a model share: s3://bucket, http://host:port/bucket, or file:///folder.",
  },
  "kv-s3-endpoint": {
    type: "text",
    default: undefined,
    defaultText: "AWS_ENDPOINT_URL_S3, or AWS",
    env: "DYN_KVBM_OBJECT_ENDPOINT",
    group: "KV tiers",
    commands: WORKERS,
    help: "Address of the S3 service for an s3:// store.",
  },
  "kv-s3-bucket": {
    type: "text",
    default: undefined,
    defaultText: "none",
    env: "DYN_KVBM_OBJECT_BUCKET",
    group: "KV tiers",
    commands: WORKERS,
    help: "The same as --kv-s3 s3://bucket.",
  },
  "kv-s3-region": {
    type: "text",
    default: undefined,
    defaultText: "AWS_REGION, or us-east-1",
    env: "DYN_KVBM_OBJECT_REGION",
    group: "KV tiers",
    commands: WORKERS,
    help: "Region of the S3 service.",
  },
  "kv-s3-access-key": {
    type: "text",
    default: undefined,
    defaultText: "AWS_ACCESS_KEY_ID",
    secret: true,
    env: "DYN_KVBM_OBJECT_ACCESS_KEY",
    group: "KV tiers",
    commands: WORKERS,
    help: "Key id for the S3 service; from the environment or a file only.",
  },
  "kv-s3-secret-key": {
    type: "text",
    default: undefined,
    defaultText: "AWS_SECRET_ACCESS_KEY",
    secret: true,
    env: "DYN_KVBM_OBJECT_SECRET_KEY",
    group: "KV tiers",
    commands: WORKERS,
    help: "Secret key for the S3 service; from the environment or a file only.",
  },
  "kv-host-min-frequency": {
    type: "integer",
    default: 0,
    min: 0,
    // The counters' range.
    max: 15,
    env: "DYN_KVBM_HOST_OFFLOAD_MIN_FREQUENCY",
    group: "KV tiers",
    commands: WORKERS,
    help: "Copy a block to host memory, and from there further down, only from its Nth use on; 0 = at once.",
  },
  "kv-disk-min-frequency": {
    type: "integer",
    default: 0,
    min: 0,
    // The counters' range.
    max: 15,
    env: "DYN_KVBM_DISK_OFFLOAD_MIN_FREQUENCY",
    group: "KV tiers",
    commands: WORKERS,
    help: "Write a block to disk only from its Nth use on, plainly counted, in place of the filter of --kv-disk-every-block.",
  },
  "kv-s3-min-frequency": {
    type: "integer",
    default: 0,
    min: 0,
    // The counters' range.
    max: 15,
    env: "DYN_KVBM_OBJECT_OFFLOAD_MIN_FREQUENCY",
    group: "KV tiers",
    commands: WORKERS,
    help: "Write a block to the store of --kv-s3 only from its Nth use on; 0 = at once.",
  },
  "kv-remote-path": {
    type: "text",
    default: undefined,
    defaultText: "none",
    env: "DYN_KVBM_REMOTE_DISK_PATH",
    group: "KV tiers",
    commands: WORKERS,
    help: "A shared folder in place of a bucket; the same as --kv-s3 file:///folder.",
  },
  "max-num-seqs": {
    type: "integer",
    default: 64,
    defaultText: "64; with --engine vllm, sglang or trtllm: the engine's own; mocker and replay: 256",
    min: 1,
    // libllama's own bound on sequences of one context, 256, is checked where that engine is configured.
    max: 65_536,
    env: "DYN_MAX_NUM_SEQS",
    group: "Model and engine",
    commands: [...WORKERS, "mocker", "replay"],
    help: "Sequences one worker runs at once.",
  },
  "max-num-batched-tokens": {
    type: "integer",
    // About one second of prefill on two slow cores: a longer step would hold up the streams that decode.
    default: 512,
    defaultText: "512; with --engine vllm, sglang or trtllm: the engine's own; mocker and replay: 8192",
    min: 16,
    max: 1_048_576,
    env: "DYN_MAX_NUM_BATCHED_TOKENS",
    group: "Model and engine",
    commands: [...WORKERS, "mocker", "replay"],
    help: "Tokens one engine step takes.",
  },
  "kv-cache-block-size": {
    type: "integer",
    default: 16,
    defaultText:
      "16; with --engine vllm or trtllm: the engine's own; sglang 16; mocker and replay: 64, with --engine-type sglang 1",
    min: 1,
    max: 1_024,
    env: "DYN_KV_CACHE_BLOCK_SIZE",
    also: [{ flag: "block-size" }],
    group: "Model and engine",
    commands: [...WORKERS, "mocker", "replay"],
    help: "Tokens per KV block.",
  },
  "batch-invariant": {
    type: "choice",
    choices: ["on", "off"],
    default: "on",
    env: "DYN_BATCH_INVARIANT",
    group: "Model and engine",
    commands: WORKERS,
    help: "on: what a token's neighbours in a batch are, and whether its prefix was cached, fetched or computed, does not change its text (with one compute thread; with more, single streams still round otherwise). off: longer prompts are computed faster, and texts part at near ties.",
  },
  threads: {
    type: "integer",
    default: 0,
    defaultText: "0 = this machine's cores divided by --workers",
    min: 0,
    max: 1_024,
    env: "DYN_THREADS",
    group: "Model and engine",
    commands: WORKERS,
    help: "Compute threads of one worker. More than there are cores makes decoding many times slower.",
  },
  "engine-request-limit": {
    type: "integer",
    default: undefined,
    defaultText: "the sequences it runs at once",
    min: 1,
    max: 1_000_000,
    env: "DYN_ENGINE_REQUEST_LIMIT",
    group: "Model and engine",
    commands: [...WORKERS, "mocker"],
    help: "Requests a worker's engine has at once, not counting those that wait.",
  },
  "request-queue-limit": {
    type: "integer",
    // Dynamo's: what waits at a worker cannot go elsewhere, so it is to wait in the frontend.
    default: 16,
    min: 2,
    max: 1_000_000,
    env: "DYN_DYNAMO_REQUEST_QUEUE_LIMIT",
    group: "Model and engine",
    commands: [...WORKERS, "mocker"],
    help: "Requests that may wait on a worker beyond those; more are refused and tried elsewhere.",
  },
  "echo-step-ms": {
    type: "number",
    default: 0,
    min: 0,
    max: 60_000,
    env: "DYN_ECHO_STEP_MS",
    group: "Model and engine",
    commands: WORKERS,
    help: "Pause between two steps of the echo engine.",
  },
  component: {
    type: "text",
    default: "backend",
    env: "DYN_COMPONENT",
    group: "Model and engine",
    commands: ["worker", "mocker"],
    help: "Component name of the worker in discovery.",
  },
  "system-port": {
    type: "integer",
    default: undefined,
    defaultText: "not served",
    min: 0,
    max: 65_535,
    env: "DYN_SYSTEM_PORT",
    group: "Model and engine",
    commands: ["router", "worker", "mocker"],
    help: "Port for this process's own /health, /live and /metrics on loopback; 0 = any free port.",
  },
  ...ENGINE_OPTIONS,
  ...MOCKER_OPTIONS,
  ...REPLAY_OPTIONS,
  // ---- HTTP ----
  "http-host": {
    type: "text",
    // Loopback until the operator says otherwise: there are no keys yet.
    default: "127.0.0.1",
    env: "DYN_HTTP_HOST",
    group: "HTTP",
    commands: [...FRONTENDS, "doctor"],
    help: "Address to listen on. 0.0.0.0 opens the API to the network, without authentication.",
  },
  "http-port": {
    type: "integer",
    default: 8000,
    min: 0,
    max: 65_535,
    env: "DYN_HTTP_PORT",
    group: "HTTP",
    commands: [...FRONTENDS, "doctor"],
    help: "Port of the OpenAI API; 0 = any free port.",
  },
  "frontend-threads": {
    type: "integer",
    default: 1,
    min: 1,
    max: 64,
    env: "DYN_FRONTEND_THREADS",
    group: "HTTP",
    commands: FRONTENDS,
    help: "Threads that serve the port together and share one KV index; each takes its part of the limits.",
  },
  "graceful-shutdown-timeout-secs": {
    type: "number",
    default: 10,
    min: 0,
    max: 86_400,
    env: "DYN_GRACEFUL_SHUTDOWN_TIMEOUT_SECS",
    also: [{ flag: "http-graceful-shutdown-timeout-secs", env: "DYN_HTTP_GRACEFUL_SHUTDOWN_TIMEOUT_SECS" }],
    group: "HTTP",
    commands: ROLES,
    help: "How long running requests may finish after SIGTERM or Ctrl-C.",
  },
  "graceful-shutdown-grace-period-secs": {
    type: "number",
    // Longer than a load balancer takes to look at /health; Dynamo's 5 would be felt at each Ctrl-C.
    default: 1,
    min: 0,
    max: 3_600,
    env: "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS",
    group: "HTTP",
    commands: FRONTENDS,
    help: "How long a leaving frontend still answers 503 to those who hold connections, so that they go elsewhere.",
  },
  "handoff-memory-mb": {
    type: "integer",
    // 5,800 prompt tokens of SmolLM2-135M on their way at a time.
    default: 128,
    min: 1,
    max: 1 << 20,
    env: "DYN_HANDOFF_MEMORY_MB",
    group: "Model and engine",
    commands: [...WORKERS, "mocker"],
    help: "Memory of a prefill worker for KV blocks that wait to be fetched, shared with processes of the host; a decode worker may use as much while it fetches.",
  },
  "transfer-backend": {
    type: "choice",
    choices: ["auto", "shm", "tcp"],
    default: "auto",
    env: "DYN_TRANSFER_BACKEND",
    group: "Planes",
    commands: [...WORKERS, "mocker"],
    help: "What moves KV blocks between workers: auto = shared memory between processes of one host, TCP otherwise.",
  },
  "transfer-slow-path": {
    type: "choice",
    choices: ["allow", "warn", "refuse"],
    default: "warn",
    env: "DYN_TRANSFER_SLOW_PATH",
    group: "Planes",
    commands: [...WORKERS, "mocker"],
    help: "What to do when KV blocks can only take a slower way than both workers have: warn = a log line per pair, and in dynamo status; refuse = they are computed.",
  },
  "transfer-slow-gbps": {
    type: "number",
    // Between a busy host's shared memory and a path that costs more than computing.
    default: 0.1,
    min: 0,
    max: 10_000,
    env: "DYN_TRANSFER_SLOW_GBPS",
    group: "Planes",
    commands: [...WORKERS, "mocker"],
    help: "KV transfers of a megabyte or more below so many GB/s are told in the log, once per pair, and in dynamo status; 0 = never.",
  },
  "handoff-lease-secs": {
    type: "number",
    default: 30,
    min: 0.1,
    max: 3_600,
    env: "DYN_HANDOFF_LEASE_SECS",
    group: "Faults",
    commands: [...WORKERS, "mocker"],
    help: "How long handed-off KV blocks wait to be claimed before their memory is used anew.",
  },
  "handoff-timeout-secs": {
    type: "number",
    default: 5,
    min: 0.1,
    max: 3_600,
    env: "DYN_HANDOFF_TIMEOUT_SECS",
    group: "Faults",
    commands: [...WORKERS, "frontend", "mocker"],
    help: "How long a frontend waits for a prefill worker's KV blocks (longer, if computing them again takes longer), and a decode worker tries to fetch them; then they are computed.",
  },
  // ---- Faults ----
  disagg: {
    type: "choice",
    choices: ["auto", "always", "never"],
    default: "auto",
    env: "DYN_DISAGG",
    group: "Routing",
    commands: FRONTENDS,
    help: "Where there are prefill workers, whether a request is split over two workers: auto = when the measured times say that it pays.",
  },
  "disagg-wait-secs": {
    type: "number",
    default: 10,
    min: 0.1,
    max: 3_600,
    env: "DYN_DISAGG_WAIT_SECS",
    group: "Routing",
    commands: FRONTENDS,
    help: "How long a request that is to be split waits, before its prompt is computed, for a decode worker with a place and KV memory free; then a decode worker has it whole, in its own queue.",
  },
  "migration-limit": {
    type: "integer",
    default: 3,
    min: 0,
    max: 1_000,
    env: "DYN_MIGRATION_LIMIT",
    group: "Faults",
    commands: FRONTENDS,
    help: "How often a request may go on with another worker when its own dies, hangs or leaves; 0 = never.",
  },
  "migration-max-seq-len": {
    type: "integer",
    default: undefined,
    min: 1,
    max: 1 << 30,
    env: "DYN_MIGRATION_MAX_SEQ_LEN",
    group: "Faults",
    commands: FRONTENDS,
    help: "Requests with more tokens than this, prompt and answer together, do not move to another worker.",
  },
  "worker-stall-timeout-secs": {
    type: "number",
    default: 30,
    min: 0,
    max: 86_400,
    env: "DYN_WORKER_STALL_TIMEOUT_SECS",
    group: "Faults",
    commands: FRONTENDS,
    help: "A worker that gives no token to any request it has begun for so long is left, its requests move; 0 = off.",
  },
  "worker-heartbeat-timeout-secs": {
    type: "number",
    default: 3,
    min: 0.1,
    max: 3_600,
    env: "DYN_WORKER_HEARTBEAT_TIMEOUT_SECS",
    group: "Faults",
    commands: ROLES,
    help: "A process at the other end of a connection that does not answer for so long is taken for dead.",
  },
  "engine-stall-timeout-secs": {
    type: "number",
    default: 60,
    min: 0,
    max: 86_400,
    env: "DYN_ENGINE_STALL_TIMEOUT_SECS",
    group: "Faults",
    commands: [...WORKERS, "mocker"],
    help: "A worker whose engine has work but makes no step for so long leaves with an error, to be restarted; 0 = off.",
  },
  // ---- Limits ----
  "http-body-limit-mb": {
    type: "integer",
    // A million tokens of text are about 5 MB.
    default: 16,
    min: 1,
    max: 1_024,
    env: "DYN_HTTP_BODY_LIMIT_MB",
    group: "Limits",
    commands: FRONTENDS,
    help: "Largest request body, MiB.",
  },
  "http-headers-timeout-secs": {
    type: "number",
    // Slow networks need a second or two; a connection that sends a byte a second is an attack.
    default: 10,
    min: 0.1,
    max: 600,
    env: "DYN_HTTP_HEADERS_TIMEOUT_SECS",
    group: "Limits",
    commands: FRONTENDS,
    help: "Time a client has to send its headers.",
  },
  "http-body-timeout-secs": {
    type: "number",
    // 16 MiB at 2 Mbit/s.
    default: 60,
    min: 0.1,
    max: 3_600,
    env: "DYN_HTTP_BODY_TIMEOUT_SECS",
    group: "Limits",
    commands: FRONTENDS,
    help: "Time a client has to send its body.",
  },
  "http-connections": {
    type: "integer",
    // Below the usual limit of 20,000 file descriptors.
    default: 16_384,
    min: 1,
    max: 1_000_000,
    env: "DYN_HTTP_CONNECTIONS",
    group: "Limits",
    commands: FRONTENDS,
    help: "Open client connections.",
  },
  "max-messages": {
    type: "integer",
    // The longest agent sessions have several hundred.
    default: 2_048,
    min: 1,
    max: 1_000_000,
    env: "DYN_MAX_MESSAGES",
    group: "Limits",
    commands: FRONTENDS,
    help: "Messages of one chat request.",
  },
  "max-choices": {
    type: "integer",
    default: 16,
    min: 1,
    max: 1_024,
    env: "DYN_MAX_CHOICES",
    group: "Limits",
    commands: FRONTENDS,
    help: "Largest `n`.",
  },
  "max-stop-strings": {
    type: "integer",
    // The API documents 4; others allow 16.
    default: 16,
    min: 0,
    max: 1_024,
    env: "DYN_MAX_STOP_STRINGS",
    group: "Limits",
    commands: FRONTENDS,
    help: "Stop strings of one request.",
  },
  "max-prompts": {
    type: "integer",
    default: 256,
    min: 1,
    max: 65_536,
    env: "DYN_MAX_PROMPTS",
    group: "Limits",
    commands: FRONTENDS,
    help: "Prompts of one completion request.",
  },
  "max-concurrent-requests": {
    type: "integer",
    // Sixteen workers of 64 sequences; each request holds about 30 kB in the frontend.
    default: 1_024,
    min: 1,
    max: 1_000_000,
    env: "DYN_MAX_CONCURRENT_REQUESTS",
    group: "Limits",
    commands: FRONTENDS,
    help: "Requests the frontend serves at once.",
  },
  "max-concurrent-requests-per-model": {
    type: "integer",
    default: undefined,
    defaultText: "what its workers run at once, and up to 8 more for each",
    min: 1,
    max: 1_000_000,
    env: "DYN_MAX_CONCURRENT_REQUESTS_PER_MODEL",
    also: [
      {
        flag: "rejection-frontend-request-concurrency-limit",
        env: "DYN_REJECTION_FRONTEND_REQUEST_CONCURRENCY_LIMIT",
      },
    ],
    group: "Limits",
    commands: FRONTENDS,
    help: "Answers of one model that the frontend has on workers at once; the others wait, in fair shares per key. Of several frontends each takes its part.",
  },
  "max-queued-requests": {
    type: "integer",
    default: 1_024,
    min: 0,
    max: 1_000_000,
    env: "DYN_MAX_QUEUED_REQUESTS",
    group: "Limits",
    commands: FRONTENDS,
    help: "Requests that wait for a place in the frontend; more get status 529.",
  },
  "request-timeout-secs": {
    type: "number",
    // 4,000 tokens at 7 tokens a second.
    default: 600,
    min: 0.1,
    max: 86_400,
    env: "DYN_REQUEST_TIMEOUT_SECS",
    group: "Limits",
    commands: [...FRONTENDS, "replay"],
    help: "Longest time of a whole request; a client may ask for less with x-request-timeout-ms.",
  },
  "queue-timeout-secs": {
    type: "number",
    // Twice what people wait for a first word; what waited longer has mostly been given up.
    default: 120,
    min: 0,
    max: 86_400,
    env: "DYN_QUEUE_TIMEOUT_SECS",
    group: "Limits",
    commands: FRONTENDS,
    help: "Longest wait for a turn, in the frontend and again in the router; then status 529. 0 = no limit.",
  },
  "first-token-timeout-secs": {
    type: "number",
    // A prompt of 30,000 tokens at 100 tokens a second.
    default: 300,
    min: 0,
    max: 86_400,
    env: "DYN_FIRST_TOKEN_TIMEOUT_SECS",
    group: "Limits",
    commands: FRONTENDS,
    help: "How long a worker may take to the first token of an answer before another one is tried. 0 = no limit.",
  },
  "stream-idle-timeout-secs": {
    type: "number",
    // Many times the longest step; preempted sequences wait for others to end.
    default: 60,
    min: 0,
    max: 86_400,
    env: "DYN_STREAM_IDLE_TIMEOUT_SECS",
    group: "Limits",
    commands: FRONTENDS,
    help: "How long a worker may give no token to an answer it has begun before another one is tried. 0 = no limit.",
  },
  "response-buffer-kb": {
    type: "integer",
    // About 5,000 streamed tokens that a client has not read.
    default: 1_024,
    min: 16,
    max: 1_048_576,
    env: "DYN_RESPONSE_BUFFER_KB",
    group: "Limits",
    commands: FRONTENDS,
    help: "KiB a client may leave unread before its stream is closed.",
  },
  "tokenizer-cache-bytes": {
    type: "integer",
    // Dynamo's: some hundred prompts of 100,000 characters. Only text that comes more than once fills it.
    default: 64 * 1024 * 1024,
    min: 0,
    max: 17_179_869_184,
    env: "DYN_TOKENIZER_CACHE_BYTES",
    group: "Limits",
    commands: FRONTENDS,
    help: "Memory for prompt texts that came before and their tokens, per model and frontend thread; 0 keeps none.",
  },
  "admin-key": {
    type: "text",
    default: undefined,
    defaultText: "none: clients of this machine are operators",
    secret: true,
    env: "DYN_ADMIN_KEY",
    group: "HTTP",
    commands: [...FRONTENDS, "requests", "disagg"],
    help: "Whoever sends it is an operator: may see and end requests, see routing explanations, set busy thresholds, name workers and tenants.",
  },
  // ---- Routing ----
  "router-mode": {
    type: "choice",
    choices: ["round-robin", "random", "power-of-two", "least-loaded", "kv", "stay-until-saturated", "direct"],
    default: "round-robin",
    defaultText: "round-robin; local and replay: kv",
    env: "DYN_ROUTER_MODE",
    group: "Routing",
    commands: ROUTERS_AND_REPLAY,
    help: "How a worker is chosen for a request.",
  },
  "router-policy-module": {
    type: "text",
    default: undefined,
    defaultText: "none",
    env: "DYN_ROUTER_POLICY_MODULE",
    group: "Routing",
    commands: ROUTERS_AND_REPLAY,
    help: "JavaScript or TypeScript module whose default export is a routing policy of one's own, { name, choose(snapshot) }; in place of --router-mode.",
  },
  "router-kv-events": {
    type: "switch",
    default: true,
    env: "DYN_ROUTER_USE_KV_EVENTS",
    group: "Routing",
    commands: ROUTERS,
    help: "Whether KV-aware routing follows the workers' KV events. Off: by its own decisions.",
  },
  "router-kv-overlap-score-credit": {
    type: "number",
    default: 1,
    min: 0,
    max: 100,
    also: [
      { flag: "kv-overlap-score-credit" },
      { flag: "kv-overlap-score-weight", env: "DYN_KV_OVERLAP_SCORE_WEIGHT" },
    ],
    env: "DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT",
    group: "Routing",
    commands: ROUTERS_AND_REPLAY,
    help: "How much of its prefill a block that a worker has cached saves; 0 = cached blocks do not count.",
  },
  "router-kv-overlap-score-credit-decay": {
    type: "number",
    default: 0,
    min: 0,
    max: 1000,
    env: "DYN_ROUTER_KV_OVERLAP_SCORE_CREDIT_DECAY",
    group: "Routing",
    commands: ROUTERS_AND_REPLAY,
    help: "How fast that credit shrinks on a worker whose backlog is longer than the least loaded one's.",
  },
  "router-prefill-load-scale": {
    type: "number",
    default: 1,
    min: 0,
    max: 1000,
    env: "DYN_ROUTER_PREFILL_LOAD_SCALE",
    group: "Routing",
    commands: ROUTERS_AND_REPLAY,
    help: "Weight of the prompt tokens to compute against the blocks in use.",
  },
  "router-host-cache-hit-weight": {
    type: "number",
    default: 0.75,
    min: 0,
    max: 100,
    env: "DYN_ROUTER_HOST_CACHE_HIT_WEIGHT",
    group: "Routing",
    commands: ROUTERS,
    help: "Credit of a block that a worker has in host memory.",
  },
  "router-disk-cache-hit-weight": {
    type: "number",
    default: 0.25,
    min: 0,
    max: 100,
    env: "DYN_ROUTER_DISK_CACHE_HIT_WEIGHT",
    group: "Routing",
    commands: ROUTERS,
    help: "Credit of a block that a worker has on disk.",
  },
  "shared-cache-multiplier": {
    type: "number",
    default: 0.1,
    min: 0,
    max: 100,
    env: "DYN_SHARED_CACHE_MULTIPLIER",
    group: "Routing",
    commands: ROUTERS,
    help: "Credit of a block that a worker finds in the object store or folder of --kv-s3.",
  },
  "router-decode-active-request-weight": {
    type: "number",
    default: 0,
    min: 0,
    max: 1000000,
    env: "DYN_ROUTER_DECODE_ACTIVE_REQUEST_WEIGHT",
    group: "Routing",
    commands: ROUTERS_AND_REPLAY,
    help: "Cost in blocks of each request that runs on a worker.",
  },
  "router-temperature": {
    type: "number",
    default: 0,
    min: 0,
    max: 1000,
    env: "DYN_ROUTER_TEMPERATURE",
    group: "Routing",
    commands: ROUTERS_AND_REPLAY,
    help: "Above 0, workers are drawn by cost instead of the cheapest taken; larger is more even.",
  },
  "router-max-imbalance": {
    type: "number",
    default: 2,
    min: 0,
    max: 1000,
    env: "DYN_ROUTER_MAX_IMBALANCE",
    group: "Routing",
    commands: ROUTERS_AND_REPLAY,
    help: "KV modes pass over a worker with this many times the mean load, however much it has cached; 0 = no bound.",
  },
  "router-ttl-secs": {
    type: "number",
    default: 120,
    min: 0.001,
    max: 31536000,
    env: "DYN_ROUTER_TTL_SECS",
    group: "Routing",
    commands: ROUTERS,
    help: "Without KV events: how long a prompt counts as cached where it was sent.",
  },
  "router-predicted-ttl-secs": {
    type: "number",
    default: undefined,
    defaultText: "off",
    min: 0.001,
    max: 31536000,
    env: "DYN_ROUTER_PREDICTED_TTL_SECS",
    group: "Routing",
    commands: ROUTERS,
    help: "Beside KV events: how long a prompt counts as cached where it was sent; 5 covers the time until the events come.",
  },
  "router-track-active-blocks": {
    type: "switch",
    default: true,
    env: "DYN_ROUTER_TRACK_ACTIVE_BLOCKS",
    group: "Routing",
    commands: ROUTERS_AND_REPLAY,
    help: "Whether the blocks of running requests count as load.",
  },
  "router-track-output-blocks": {
    type: "switch",
    default: false,
    env: "DYN_ROUTER_TRACK_OUTPUT_BLOCKS",
    group: "Routing",
    commands: ROUTERS_AND_REPLAY,
    help: "Whether generated tokens count as blocks too.",
  },
  "router-track-prefill-tokens": {
    type: "switch",
    default: true,
    env: "DYN_ROUTER_TRACK_PREFILL_TOKENS",
    group: "Routing",
    commands: ROUTERS_AND_REPLAY,
    help: "Whether prompt tokens that wait to be computed count as load.",
  },
  "router-assume-kv-reuse": {
    type: "switch",
    default: true,
    env: "DYN_ROUTER_ASSUME_KV_REUSE",
    group: "Routing",
    commands: ROUTERS_AND_REPLAY,
    help: "Whether requests that run at the same time share the blocks of a common prefix.",
  },
  "router-queue-threshold": {
    type: "number",
    default: undefined,
    defaultText: "off",
    min: 0,
    max: 1000000,
    env: "DYN_ROUTER_QUEUE_THRESHOLD",
    group: "Routing",
    commands: ROUTERS_AND_REPLAY,
    help: "Requests wait in the router while every worker has more than this many batches to prefill.",
  },
  "router-queue-policy": {
    type: "choice",
    default: "fcfs",
    choices: ["fcfs", "lcfs", "wspt"],
    env: "DYN_ROUTER_QUEUE_POLICY",
    group: "Routing",
    commands: ROUTERS_AND_REPLAY,
    help: "Order of the requests that wait: arrival, newest first, or least uncached work first.",
  },
  "router-queue-limit": {
    type: "integer",
    default: 4096,
    min: 1,
    max: 1000000,
    env: "DYN_ROUTER_QUEUE_LIMIT",
    group: "Routing",
    commands: ROUTERS_AND_REPLAY,
    help: "Requests that may wait in one model's router; more get status 529.",
  },
  "router-overlap-refresh-after-secs": {
    type: "number",
    default: 10,
    min: 0,
    max: 86400,
    env: "DYN_ROUTER_OVERLAP_REFRESH_AFTER_SECS",
    group: "Routing",
    commands: ROUTERS_AND_REPLAY,
    help: "A request that waited this long gets its place by its cached prefix of now; 0 = never.",
  },
  "router-session-affinity-ttl-secs": {
    type: "number",
    default: undefined,
    defaultText: "off",
    min: 1,
    max: 31536000,
    env: "DYN_ROUTER_SESSION_AFFINITY_TTL_SECS",
    group: "Routing",
    commands: ROUTERS,
    help: "How long a session (x-dynamo-session-id) stays with its worker after its last request.",
  },
  "router-replica-sync": {
    type: "switch",
    default: false,
    env: "DYN_ROUTER_REPLICA_SYNC",
    group: "Routing",
    commands: ROUTERS,
    help: "Frontends, or router services, tell each other what they have on the workers, so that all see one load.",
  },
  "active-decode-blocks-threshold": {
    type: "number",
    default: undefined,
    defaultText: "off",
    min: 0,
    max: 1,
    env: "DYN_ACTIVE_DECODE_BLOCKS_THRESHOLD",
    group: "Routing",
    commands: ROUTERS,
    help: "A worker with more than this part of its KV blocks in use is busy; when all are, requests get status 529.",
  },
  "active-prefill-tokens-threshold": {
    type: "number",
    default: undefined,
    defaultText: "off",
    min: 0,
    max: 1099511627776,
    env: "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD",
    group: "Routing",
    commands: ROUTERS,
    help: "A worker with more prompt tokens to compute is busy.",
  },
  "active-prefill-tokens-threshold-frac": {
    type: "number",
    default: undefined,
    defaultText: "off",
    min: 0,
    max: 1000,
    env: "DYN_ACTIVE_PREFILL_TOKENS_THRESHOLD_FRAC",
    group: "Routing",
    commands: ROUTERS,
    help: "The same in batches of the engine.",
  },
  "router-service": {
    type: "switch",
    default: false,
    env: "DYN_ROUTER_SERVICE",
    group: "Routing",
    commands: ["frontend"],
    help: "Ask `dynamo router` where requests go; while none answers, the frontend chooses round-robin. --router-... options are then the router's.",
  },
  "router-service-timeout-secs": {
    type: "number",
    // A decision takes well under a millisecond; a router that needs a thousand times as long is stuck.
    default: 1,
    min: 0.001,
    max: 3600,
    env: "DYN_ROUTER_SERVICE_TIMEOUT_SECS",
    group: "Routing",
    commands: ["frontend"],
    help: "How long the router service may take to answer; waiting in its queue does not count.",
  },
  // ---- Planes ----
  namespace: {
    type: "text",
    default: "dynamo",
    env: "DYN_NAMESPACE",
    group: "Planes",
    commands: [...ROLES, "status"],
    help: "Frontends and workers meet when they have the same namespace and the same planes.",
  },
  "discovery-backend": {
    type: "choice",
    choices: ["file", "memory"],
    synonyms: { mem: "memory" },
    default: "file",
    env: "DYN_DISCOVERY_BACKEND",
    group: "Planes",
    commands: ["frontend", "router", "worker", "mocker", "status"],
    help: "How processes find each other. memory is for one process alone.",
  },
  "file-kv": {
    type: "text",
    default: undefined,
    defaultText: "a folder per user in the temporary folder; local: a fresh one",
    env: "DYN_FILE_KV",
    group: "Planes",
    commands: [...ROLES, "status", "doctor"],
    help: "Folder of the file discovery backend; on one machine or a shared disk.",
  },
  "request-plane": {
    type: "choice",
    choices: ["tcp", "memory"],
    synonyms: { mem: "memory" },
    default: "tcp",
    env: "DYN_REQUEST_PLANE",
    group: "Planes",
    commands: ["frontend", "router", "worker", "mocker"],
    help: "How requests reach workers.",
  },
  "tcp-rpc-host": {
    type: "text",
    default: "127.0.0.1",
    env: "DYN_TCP_RPC_HOST",
    group: "Planes",
    commands: ["router", "worker", "mocker"],
    help: "Address the request plane of workers and routers listens on; set DYN_CLUSTER_SECRET before opening it to a network.",
  },
  "tcp-rpc-port": {
    type: "integer",
    default: 0,
    min: 0,
    max: 65_535,
    env: "DYN_TCP_RPC_PORT",
    group: "Planes",
    commands: ["router", "worker", "mocker"],
    help: "Port of that request plane; 0 = any free port.",
  },
  "tcp-rpc-advertise-host": {
    type: "text",
    default: undefined,
    defaultText: "--tcp-rpc-host",
    env: "DYN_TCP_RPC_ADVERTISE_HOST",
    group: "Planes",
    commands: ["router", "worker", "mocker"],
    help: "Address that frontends connect to, when it is not the one to listen on.",
  },
  "tcp-rpc-advertise-port": {
    type: "integer",
    default: undefined,
    defaultText: "--tcp-rpc-port",
    min: 1,
    max: 65_535,
    env: "DYN_TCP_RPC_ADVERTISE_PORT",
    group: "Planes",
    commands: ["router", "worker", "mocker"],
    help: "Port that frontends connect to, when it is not the one to listen on: behind a proxy or a port mapping.",
  },
  "event-plane": {
    type: "choice",
    choices: ["zmq", "memory"],
    synonyms: { auto: "zmq", mem: "memory" },
    default: "zmq",
    env: "DYN_EVENT_PLANE",
    group: "Planes",
    commands: ["frontend", "router", "worker", "mocker", "status"],
    help: "How load and KV events travel.",
  },
  "zmq-host": {
    type: "text",
    default: "127.0.0.1",
    env: "DYN_ZMQ_HOST",
    group: "Planes",
    commands: ["router", "worker", "mocker"],
    help: "Address the event publishers of workers and routers listen on.",
  },
  "zmq-advertise-host": {
    type: "text",
    default: undefined,
    defaultText: "--zmq-host",
    env: "DYN_ZMQ_ADVERTISE_HOST",
    group: "Planes",
    commands: ["router", "worker", "mocker"],
    help: "Address that event subscribers connect to, when it is not the one to listen on.",
  },
  "cluster-secret": {
    type: "text",
    default: undefined,
    defaultText: "none; local: a fresh random one",
    secret: true,
    env: "DYN_CLUSTER_SECRET",
    group: "Planes",
    commands: ROLES,
    help: "Shared by all processes of a cluster: a request-plane peer without it is refused. Only from the environment or the configuration file.",
  },
  // ---- Logs ----
  log: {
    type: "choice",
    choices: ["trace", "debug", "info", "warn", "error", "silent"],
    default: "info",
    env: "DYN_LOG",
    group: "Logs",
    commands: [...ROLES, "status"],
    help: "Least severe level that is logged to stderr.",
  },
  "logging-console-format": {
    type: "choice",
    choices: ["readable", "jsonl"],
    default: "readable",
    env: "DYN_LOGGING_CONSOLE_FORMAT",
    group: "Logs",
    commands: [...ROLES, "status"],
    help: "Lines for people or one JSON object per line.",
  },
  // ---- General ----
  config: {
    type: "text",
    default: undefined,
    defaultText: "none",
    env: "DYN_CONFIG",
    group: "General",
    commands: COMMAND_NAMES,
    help: "YAML file with options, named like the flags without dashes in front.",
  },
  "start-timeout-secs": {
    type: "number",
    default: 120,
    min: 1,
    max: 3_600,
    env: "DYN_START_TIMEOUT_SECS",
    group: "General",
    commands: ["local"],
    help: "How long the frontend and the workers may take until the model is served.",
  },
  "model-dir": {
    type: "text",
    default: undefined,
    defaultText: "~/.cache/dynamo-ts/models",
    env: "DYN_MODEL_DIR",
    group: "General",
    commands: ["local", "worker", "mocker", "model", "doctor"],
    help: "Folder of pulled models.",
  },
  json: {
    type: "switch",
    default: false,
    env: "DYN_JSON",
    group: "General",
    commands: ["replay", "model", "status", "requests", "disagg", "doctor"],
    help: "Print JSON for machines.",
  },
  frontend: {
    type: "text",
    default: "http://127.0.0.1:8000",
    env: "DYN_FRONTEND",
    group: "General",
    commands: ["requests", "disagg"],
    help: "Address of the frontend to ask.",
  },
  show: {
    type: "integer",
    default: 20,
    min: 1,
    max: 1_000,
    env: "DYN_REQUESTS_SHOW",
    group: "General",
    commands: ["requests"],
    help: "Requests to show, the oldest first.",
  },
  once: {
    type: "switch",
    default: false,
    env: "DYN_STATUS_ONCE",
    group: "General",
    commands: ["status"],
    help: "Print one table and leave instead of following changes.",
  },
} as const satisfies Record<string, OptionSpec>;

export type OptionName = keyof typeof OPTIONS;

type ValueOf<Spec extends OptionSpec> = Spec extends { choices: readonly (infer Choice)[] }
  ? Choice
  : Spec extends SwitchOption
    ? boolean
    : Spec extends NumberOption
      ? number | (undefined extends Spec["default"] ? undefined : never)
      : string | (undefined extends Spec["default"] ? undefined : never);

/** The value of every option; those that a command does not have keep their default. */
export type OptionValues = { readonly [Name in OptionName]: ValueOf<(typeof OPTIONS)[Name]> };

export const OPTION_NAMES = Object.keys(OPTIONS) as OptionName[];

export function optionsOf(command: CommandName): OptionName[] {
  // A worker under the name that Dynamo gives it.
  const listed = isEngineCommand(command) ? "worker" : command;
  return OPTION_NAMES.filter((name) => (OPTIONS[name].commands as readonly CommandName[]).includes(listed));
}

/** As `command` takes it: a few options mean a little more to one command than to the others. */
export function specOf(name: OptionName, command?: CommandName): OptionSpec {
  const variants: Partial<Record<OptionName, OptionSpec>> =
    command === "replay"
      ? REPLAY_VARIANTS
      : command === "local"
        ? LOCAL_VARIANTS
        : isEngineCommand(command)
          ? { engine: { ...OPTIONS.engine, default: command } }
          : {};
  return variants[name] ?? OPTIONS[name];
}

/** Commands that are workers with one engine, named after it. */
const ENGINE_COMMANDS = ["vllm", "sglang", "trtllm"] as const;
export type EngineCommandName = (typeof ENGINE_COMMANDS)[number];

export function isEngineCommand(command: CommandName | undefined): command is EngineCommandName {
  return (ENGINE_COMMANDS as readonly (CommandName | undefined)[]).includes(command);
}

/** One's own cluster routes by cached prefix; the roles one by one keep Dynamo's default. */
const LOCAL_VARIANTS: Partial<Record<OptionName, OptionSpec>> = {
  "router-mode": { ...OPTIONS["router-mode"], default: "kv" },
};

/**
 * Flags of 0.9.1 (the release most write-ups describe) that were renamed since. Accepted, with one line that tells the
 * new name. `value` is what the new flag gets when the old one was a switch.
 */
export interface RetiredFlag {
  readonly name: OptionName;
  readonly value?: string;
  /** How the new spelling is shown. */
  readonly now: string;
}

export const RETIRED_FLAGS: Readonly<Record<string, RetiredFlag>> = {
  "store-kv": { name: "discovery-backend", now: "--discovery-backend" },
  "no-kv-events": { name: "router-kv-events", value: "false", now: "--no-router-kv-events" },
  "is-prefill-worker": { name: "disaggregation-mode", value: "prefill", now: "--disaggregation-mode=prefill" },
  "is-decode-worker": { name: "disaggregation-mode", value: "decode", now: "--disaggregation-mode=decode" },
};
