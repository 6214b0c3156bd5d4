import type { CommandName } from "./options.ts";

/** What `dynamo` can do. The modules are loaded only when their command runs: `dynamo --help` must start in no time. */
export interface CommandContext {
  readonly argv: readonly string[];
  readonly env: NodeJS.ProcessEnv;
  /** Results go to stdout, everything else to stderr. */
  readonly out: (text: string) => void;
  readonly err: (text: string) => void;
}

/** Resolves with the exit code: 0 done, 1 failed; configuration errors are thrown and end with 2. */
export type CommandRun = (context: CommandContext) => Promise<number>;

export interface Command {
  readonly summary: string;
  readonly usage: string;
  readonly example: string;
  /** More than the summary, for its own help page. */
  readonly about: string;
  readonly load: () => Promise<{ run: CommandRun }>;
}

export const COMMANDS: Readonly<Record<CommandName, Command>> = {
  local: {
    summary: "serve a model on this machine: one frontend and several workers",
    usage: "dynamo local [options]",
    example: "dynamo local --model smollm2 --workers 2 --http-port 8000",
    about:
      "Pulls the model if it is not there, starts one frontend and the workers as processes of their own, restarts what\n" +
      "crashes, and ends them all on Ctrl-C. Any number of local clusters run side by side on different ports.",
    load: () => import("./local.ts"),
  },
  frontend: {
    summary: "run the OpenAI HTTP frontend and router",
    usage: "dynamo frontend [options]",
    example: "dynamo frontend --http-port 8000 --router-mode least-loaded --file-kv /tmp/cluster",
    about: "Serves every model that workers register in the same namespace; they may come and go at any time.",
    load: () => import("./frontend.ts"),
  },
  router: {
    summary: "run the router as a service of its own, for many frontends",
    usage: "dynamo router [options]",
    example: "dynamo router --router-mode kv --file-kv /tmp/cluster",
    about:
      "Frontends that were started with --router-service ask it where each request goes, and share its view of load and\n" +
      "cached blocks. When it is gone they choose by themselves until it is back. Several may run: the oldest is asked.",
    load: () => import("./router.ts"),
  },
  worker: {
    summary: "run one worker that hosts an engine",
    usage: "dynamo worker [options]",
    example: "dynamo worker --model smollm2 --threads 2 --file-kv /tmp/cluster",
    about: "Loads the model, checks itself with a short request, registers, and serves until SIGTERM drains it.",
    load: () => import("./worker.ts"),
  },
  vllm: {
    summary: "run one worker with a vLLM server as its engine",
    usage: "dynamo vllm [options] [vLLM's own flags] [-- more of them]",
    example: "dynamo vllm --model /models/Qwen3-8B --model-name qwen3 -tp 2",
    about:
      "The same as dynamo worker --engine vllm, with the command line of dynamo.vllm: flags that are none of ours go to\n" +
      "vLLM. Starts vllm serve, watches it and starts it again; with --engine-url it attaches to one that runs already.",
    load: () => import("./vllm.ts"),
  },
  sglang: {
    summary: "run one worker with an SGLang server as its engine",
    usage: "dynamo sglang [options] [SGLang's own flags] [-- more of them]",
    example: "dynamo sglang --model /models/Qwen3-8B --kv-cache-block-size 16",
    about:
      "The same as dynamo worker --engine sglang, with the command line of dynamo.sglang: flags that are none of ours go to\n" +
      "SGLang. Starts python -m sglang.launch_server, watches it and starts it again; with --engine-url it attaches to one\n" +
      "that runs already.",
    load: () => import("./sglang.ts"),
  },
  trtllm: {
    summary: "run one worker with a TensorRT-LLM server as its engine",
    usage: "dynamo trtllm [options] [trtllm-serve's own flags] [-- more of them]",
    example: "dynamo trtllm --model /models/Qwen3-8B --context-length 8192",
    about:
      "The same as dynamo worker --engine trtllm, with the command line of dynamo.trtllm: flags that are none of ours go to\n" +
      "trtllm-serve. Starts it, watches it and starts it again; with --engine-url it attaches to one that runs already.",
    load: () => import("./trtllm.ts"),
  },
  mocker: {
    summary: "run workers with a mock engine that schedules and takes its time like a real one",
    usage: "dynamo mocker [options]",
    example: "dynamo mocker --num-workers 4 --speedup-ratio 10 --file-kv /tmp/cluster",
    about:
      "For tests of load and routing without a GPU: KV blocks, batches, preemption, KV events and timing are simulated, the\n" +
      "answer is made up from the prompt. Without --model bytes are tokens.",
    load: () => import("./mocker.ts"),
  },
  replay: {
    summary: "run a trace of requests through simulated workers, or send it to a running cluster",
    usage: "dynamo replay [TRACE] [options]",
    example: "dynamo replay conversation_trace.jsonl --workers 16 --router-mode kv,round-robin",
    about:
      "TRACE is a file of Mooncake rows (JSON lines) or an Azure LLM trace (CSV); --format=synthetic makes one up. The real\n" +
      "router and mock engines run it on a virtual clock: hours in seconds, the same report for the same seed, one column\n" +
      "per router mode. With --url http://127.0.0.1:8000 the requests are sent there instead, at the trace's times, and the\n" +
      "answers are measured; Ctrl-C ends that with the report so far.",
    load: () => import("./replay.ts"),
  },
  model: {
    summary: "pull, list and remove model files",
    usage: "dynamo model pull NAME | list | rm NAME",
    example: "dynamo model pull smollm2",
    about:
      "NAME is a known model (`dynamo model list` shows them) or hf:owner/repository/file.gguf. A broken-off pull is resumed.",
    load: () => import("./model.ts"),
  },
  status: {
    summary: "show instances, models and load of a running cluster",
    usage: "dynamo status [options]",
    example: "dynamo status --file-kv /tmp/cluster --once",
    about: "Reads discovery and the load events. `dynamo local` prints the --file-kv of its cluster when it starts.",
    load: () => import("./status.ts"),
  },
  requests: {
    summary: "show the oldest requests that a frontend is serving, or end one",
    usage: "dynamo requests [cancel ID] [options]",
    example: "dynamo requests --frontend http://127.0.0.1:8000 --show 50",
    about:
      "Each with its stage (gate_queue, preprocess, route_queue, dispatch, decode, write), who has it (the frontend, the\n" +
      "router, a worker, or the client that does not read), and how long. For operators: DYN_ADMIN_KEY where one is set.",
    load: () => import("./requests.ts"),
  },
  disagg: {
    summary: "tell what splitting prefill from decode costs and gains here, or change a worker's role",
    usage: "dynamo disagg report | role INSTANCE agg|prefill|decode [options]",
    example: "dynamo disagg report --frontend http://127.0.0.1:8000",
    about:
      "The report compares both ways by prompt length, from what the frontend has measured, and advises. A role change lets\n" +
      "what runs finish, without a restart or a failed request. For operators: DYN_ADMIN_KEY where one is set.",
    load: () => import("./disagg.ts"),
  },
  doctor: {
    summary: "check this machine and say how to fix what is wrong",
    usage: "dynamo doctor [options] [-- the engine's flags]",
    example: "dynamo doctor --workers 2 --http-port 8000",
    about:
      "Checks Node, the llama library, CPU threads, the port, disk, model and discovery folder.\nWith --engine vllm and a worker's flags: all about that engine, without starting it.",
    load: () => import("./doctor.ts"),
  },
};
