import { pino, type Logger } from "pino";

/**
 * Logs go to stderr, results to stdout. `DYN_LOG` sets the level, `DYN_LOGGING_CONSOLE_FORMAT` readable or jsonl.
 * A line carries what identifies the request (`x_request_id`) or instance, never prompts, outputs or keys.
 */
export type { Logger };
export type LogFormat = "readable" | "jsonl";
export const LOG_LEVELS = ["trace", "debug", "info", "warn", "error", "silent"] as const;
export type LogLevel = (typeof LOG_LEVELS)[number];

export interface LoggerOptions {
  readonly level: LogLevel;
  readonly format: LogFormat;
  /** Put into each line: role, pid, instance. */
  readonly fields?: Readonly<Record<string, string | number>>;
  /** Where lines go; default stderr, unbuffered so that a crash loses nothing. */
  readonly write?: (line: string) => void;
}

export function createLogger(options: LoggerOptions): Logger {
  const write = options.write ?? ((line: string) => process.stderr.write(line));
  const stream = { write: options.format === "jsonl" ? write : (line: string) => write(readableLine(line)) };
  return pino(
    {
      level: options.level,
      base: options.fields ?? {},
      timestamp: () => `,"time":"${new Date().toISOString()}"`,
      messageKey: "message",
      formatters: { level: (label) => ({ level: label }) },
    },
    stream,
  );
}

/** A logger that drops everything, for tests and defaults. */
export const silentLogger: Logger = pino({ level: "silent" });

/** `12:00:01.123 INFO  worker: text key=value` from a JSON line. */
function readableLine(line: string): string {
  const { time, level, message, role, ...rest } = JSON.parse(line) as Record<string, unknown>;
  const fields = Object.entries(rest)
    .map(([key, value]) => ` ${key}=${typeof value === "string" ? value : JSON.stringify(value)}`)
    .join("");
  const who = typeof role === "string" ? `${role}: ` : "";
  return `${String(time).slice(11, 23)} ${String(level).toUpperCase().padEnd(5)} ${who}${String(message)}${fields}\n`;
}
