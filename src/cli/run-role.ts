import { createLogger } from "../observability/index.ts";
import type { Planes, RunningRole } from "../runtime/component/index.ts";
import { optionsOf, type OptionName } from "./options.ts";
import { buildPlanes } from "./planes.ts";
import { describeOptions, type ResolvedOptions } from "./resolve-options.ts";
import { milliseconds } from "./role-config.ts";

/**
 * Runs one role in this process until it is told to leave.
 *
 * SIGTERM or Ctrl-C drains; a second Ctrl-C ends at once (130). Under a supervisor (an IPC channel to the parent) Ctrl-C is
 * the parent's business, because a terminal sends it to the whole group and the order of leaving matters; and when the
 * channel closes the parent is dead, so the role stops: no process is left behind.
 */
export interface RoleRun {
  readonly role: "frontend" | "router" | "worker";
  readonly resolved: ResolvedOptions;
  /** Shown in the start-up line even when they are defaults. */
  readonly shown: readonly OptionName[];
  readonly start: (planes: Planes, signal: AbortSignal) => Promise<RunningRole>;
  /** For the supervisor and the log, once the role serves. */
  readonly facts: (role: RunningRole) => Readonly<Record<string, string | number>>;
}

/** What a supervised role sends when it serves. */
export interface ReadyMessage {
  readonly type: "ready";
  readonly facts: Readonly<Record<string, string | number>>;
}

export async function runRole(run: RoleRun): Promise<number> {
  const { values, warnings } = run.resolved;
  const logger = createLogger({
    level: values.log,
    format: values["logging-console-format"],
    fields: { role: run.role, pid: process.pid },
  });
  for (const warning of warnings) logger.warn(warning);
  // A supervisor has printed the configuration of the whole already.
  const level = isSupervised() ? "debug" : "info";
  logger[level](`configuration: ${describeOptions(run.resolved, run.shown).join(" ")}`);
  logger.debug(`all: ${describeOptions(run.resolved, optionsOf(run.resolved.command)).join(" ")}`);

  const leave = listenForLeave();
  let planes;
  try {
    planes = await buildPlanes(values, logger, { role: run.role });
    const role = await run.start(planes, leave.now);
    const facts = run.facts(role);
    process.send?.({ type: "ready", facts } satisfies ReadyMessage);
    logger.info(facts, "ready");
    const asked = await Promise.race([role.done.then(() => "ended" as const), leave.asked]);
    if (asked === "drain") {
      logger.info("draining");
      await role.drain(milliseconds(values["graceful-shutdown-timeout-secs"]));
    }
    await role.stop();
    await role.done;
    logger.info("left");
    return leave.now.aborted && !isOrphan() ? 130 : 0;
  } catch (thrown) {
    // Told to leave while it was still starting: that is no failure.
    if (leave.isAsked()) return 0;
    throw thrown;
  } finally {
    await planes?.close();
    leave.close();
  }
}

interface Leave {
  /** Resolves at the first wish to leave. */
  readonly asked: Promise<"drain" | "stop">;
  readonly isAsked: () => boolean;
  /** Aborted when there is no time to drain, or nothing to drain yet. */
  readonly now: AbortSignal;
  close(): void;
}

function listenForLeave(): Leave {
  const supervised = isSupervised();
  const abort = new AbortController();
  const { promise, resolve } = Promise.withResolvers<"drain" | "stop">();
  let asked = false;
  const ask = (how: "drain" | "stop"): void => {
    if (how === "stop" || asked) abort.abort();
    asked = true;
    resolve(how);
  };
  const onTerm = (): void => ask("drain");
  const onInterrupt = (): void => {
    if (!supervised) ask("drain");
  };
  const onDisconnect = (): void => ask("stop");
  process.on("SIGTERM", onTerm);
  process.on("SIGHUP", onInterrupt);
  process.on("SIGINT", onInterrupt);
  // Any parent with a channel: our supervisor, or the older Node that handed over to this one.
  process.on("disconnect", onDisconnect);
  return {
    asked: promise,
    isAsked: () => asked,
    now: abort.signal,
    close() {
      process.off("SIGTERM", onTerm);
      process.off("SIGHUP", onInterrupt);
      process.off("SIGINT", onInterrupt);
      process.off("disconnect", onDisconnect);
    },
  };
}

/** A supervisor marks its children, because other parents may give a channel too (the hand-over to a newer Node does). */
function isSupervised(): boolean {
  return process.env.DYN_SUPERVISED === "1" && process.send !== undefined;
}

function isOrphan(): boolean {
  return process.send !== undefined && !process.connected;
}
