import { closeSync, mkdirSync, openSync, readFileSync, rmSync, writeSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir, userInfo } from "node:os";
import { join } from "node:path";
import { DynamoError } from "../../errors/index.ts";

/**
 * Ports for servers that other programs open later: an engine takes half a minute to listen on the port it was given, and
 * until then nobody else may be given the same. A claim is a file with our process id in a folder of this user; it counts
 * while that process lives. That the port is free now is tried out as well. Hosts without our files in common (containers)
 * have ports of their own, too.
 */
export interface PortClaim {
  readonly port: number;
  /** For who claims several in a row. */
  readonly count: number;
  release(): void;
}

/** Below the system's own range for outgoing connections, so that none of those is in the way later. */
const FIRST_PORT = 18_000;
const LAST_PORT = 31_999;
const TRIES = 200;

export function defaultClaimFolder(): string {
  return join(tmpdir(), `dynamo-ts-engines-${userInfo().uid}`, "ports");
}

/** `count` free ports in a row on `host`, of our own choice. Throws `address-in-use`. */
export async function claimFreePorts(
  host: string,
  count: number,
  random: () => number,
  folder = defaultClaimFolder(),
): Promise<PortClaim> {
  for (let i = 0; i < TRIES; i++) {
    const port = FIRST_PORT + Math.floor(random() * (LAST_PORT - FIRST_PORT - count));
    const claim = await tryClaim(host, port, count, folder);
    if (typeof claim !== "string") return claim;
  }
  throw new DynamoError(
    "address-in-use",
    `no ${count} free ports in a row between ${FIRST_PORT} and ${LAST_PORT} on ${host}`,
  );
}

/** The port that somebody named. Throws `address-in-use` with who has it. */
export async function claimPort(
  host: string,
  port: number,
  flag: string,
  folder = defaultClaimFolder(),
): Promise<PortClaim> {
  const claim = await tryClaim(host, port, 1, folder);
  if (typeof claim !== "string") return claim;
  throw new DynamoError(
    "address-in-use",
    `${flag}: port ${port} on ${host} ${claim}; choose another, or leave ${flag} out for a free one`,
  );
}

/** For things that are no ports: one of this user's processes on this machine has the name. Returns its id, else the claim. */
export function claimName(name: string, folder = defaultClaimFolder()): (() => void) | number {
  mkdirSync(folder, { recursive: true, mode: 0o700 });
  const path = join(folder, name.replaceAll(/[^a-zA-Z0-9.-]+/g, "_").slice(-200));
  return takeFile(path) ?? (() => rmSync(path, { force: true }));
}

/** The claim, or what is in the way. */
async function tryClaim(host: string, first: number, count: number, folder: string): Promise<PortClaim | string> {
  mkdirSync(folder, { recursive: true, mode: 0o700 });
  const held: string[] = [];
  const release = (): void => {
    for (const path of held.splice(0)) rmSync(path, { force: true });
  };
  for (let port = first; port < first + count; port++) {
    const path = join(folder, String(port));
    const holder = takeFile(path);
    if (holder !== undefined) {
      release();
      return `is claimed by process ${holder}`;
    }
    held.push(path);
    if (!(await isFree(host, port))) {
      release();
      return "is in use";
    }
  }
  return { port: first, count, release };
}

/** Undefined when the file is ours now, else the process that has it. */
function takeFile(path: string): number | undefined {
  for (let i = 0; i < 3; i++) {
    try {
      const file = openSync(path, "wx", 0o600);
      writeSync(file, String(process.pid));
      closeSync(file);
      return undefined;
    } catch (thrown) {
      if ((thrown as NodeJS.ErrnoException).code !== "EEXIST") throw thrown;
      const holder = holderOf(path);
      if (holder !== undefined) return holder;
      // Left by a process that is gone.
      rmSync(path, { force: true });
    }
  }
  return 0;
}

function holderOf(path: string): number | undefined {
  try {
    const pid = Number(readFileSync(path, "latin1"));
    if (!Number.isInteger(pid) || pid <= 0) return undefined;
    process.kill(pid, 0);
    return pid;
  } catch (thrown) {
    // It lives, and is another user's.
    return (thrown as NodeJS.ErrnoException).code === "EPERM" ? -1 : undefined;
  }
}

async function isFree(host: string, port: number): Promise<boolean> {
  const server = createServer();
  const { promise, resolve } = Promise.withResolvers<boolean>();
  server.once("error", () => resolve(false));
  server.listen({ host, port, exclusive: true }, () => resolve(true));
  const free = await promise;
  if (free) {
    const closed = Promise.withResolvers<void>();
    server.close(() => closed.resolve());
    await closed.promise;
  }
  return free;
}
