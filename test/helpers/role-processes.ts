import { spawn, type ChildProcess } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";

const COMMAND = resolve(import.meta.dirname, "../../bin/dynamo.mjs");

export interface RoleProcess {
  readonly child: ChildProcess;
  readonly pid: number;
  /** What it said when it was ready. */
  readonly facts: Readonly<Record<string, string | number>>;
  /** The exit code; null after a signal. */
  readonly exited: Promise<number | null>;
}

/** Roles as processes of their own, started and ended by hand, in one discovery folder. */
export class RoleProcesses {
  readonly folder = mkdtempSync(join(tmpdir(), "dynamo-roles-"));
  readonly #children: { readonly child: ChildProcess; readonly exited: Promise<number | null> }[] = [];
  readonly #env: NodeJS.ProcessEnv;
  #output = "";

  /** `env`: beside this process's own. */
  constructor(env: NodeJS.ProcessEnv = {}) {
    this.#env = { ...process.env, DYN_LOG: "warn", ...env };
  }

  /** What all of them printed. */
  get output(): string {
    return this.#output;
  }

  /** Resolves when it serves. */
  async start(...argv: string[]): Promise<RoleProcess> {
    const child = spawn(process.execPath, [COMMAND, ...argv, `--file-kv=${this.folder}`], {
      stdio: ["ignore", "pipe", "pipe", "ipc"],
      env: this.#env,
    });
    const exited = new Promise<number | null>((resolveExit) => child.once("exit", (code) => resolveExit(code)));
    this.#children.push({ child, exited });
    for (const stream of [child.stdout!, child.stderr!]) {
      stream.on("data", (chunk: Buffer) => (this.#output += chunk.toString()));
    }
    const ready = await Promise.race([
      once(child, "message", { signal: AbortSignal.timeout(30_000) }) as Promise<[{ facts: RoleProcess["facts"] }]>,
      exited.then((code) => {
        throw new Error(`dynamo ${argv.join(" ")} ended with ${code}:\n${this.#output}`);
      }),
    ]);
    return { child, pid: child.pid!, facts: ready[0].facts, exited };
  }

  /** Kills what is left, and waits for it. */
  async stop(): Promise<void> {
    for (const { child } of this.#children) child.kill("SIGKILL");
    await Promise.all(this.#children.map(({ exited }) => exited));
    rmSync(this.folder, { recursive: true, force: true });
  }
}

export interface StreamedAnswer {
  readonly text: string;
  readonly tokens: number;
  readonly finish: string | null;
  /** An error event, or what broke the connection. */
  readonly error: string | undefined;
  /** Arrival of each piece of text, `performance.now()`. */
  readonly atMs: readonly number[];
}

/** One streamed completion, read to its end whatever that is. */
export async function streamCompletion(baseUrl: string, body: object, onText?: () => void): Promise<StreamedAnswer> {
  const atMs: number[] = [];
  let text = "";
  let tokens = 0;
  let finish: string | null = null;
  let error: string | undefined;
  let rest = "";
  let isDone = false;
  try {
    const response = await fetch(`${baseUrl}/v1/completions`, {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ stream: true, stream_options: { include_usage: true }, ...body }),
    });
    if (!response.ok) {
      return { text, tokens, finish, error: `${response.status} ${await response.text()}`, atMs };
    }
    const decoder = new TextDecoder();
    for await (const bytes of response.body!) {
      const events = (rest + decoder.decode(bytes as Uint8Array, { stream: true })).split("\n\n");
      rest = events.pop()!;
      for (const event of events) {
        const data = event.slice("data: ".length);
        if (data === "[DONE]") {
          isDone = true;
          continue;
        }
        const chunk = JSON.parse(data) as {
          error?: { message: string };
          choices?: { text: string; finish_reason: string | null }[];
          usage?: { completion_tokens: number } | null;
        };
        if (chunk.error !== undefined) error = chunk.error.message;
        const choice = chunk.choices?.[0];
        finish = choice?.finish_reason ?? finish;
        tokens = chunk.usage?.completion_tokens ?? tokens;
        if (choice === undefined || choice.text === "") continue;
        text += choice.text;
        atMs.push(performance.now());
        onText?.();
      }
    }
    if (!isDone) error ??= "the stream ended without [DONE]";
  } catch (thrown) {
    error = String((thrown as Error).cause ?? thrown);
  }
  return { text, tokens, finish, error, atMs };
}

/** The longest silence of a stream that includes or follows `sinceMs`. */
export function longestGapMs({ atMs }: StreamedAnswer, sinceMs: number): number {
  let longest = 0;
  for (let i = 1; i < atMs.length; i++) {
    if (atMs[i]! >= sinceMs) longest = Math.max(longest, atMs[i]! - atMs[i - 1]!);
  }
  return longest;
}
