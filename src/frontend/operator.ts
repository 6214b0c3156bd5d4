import { createHash, timingSafeEqual } from "node:crypto";
import { DynamoError } from "../errors/index.ts";
import type { Exchange } from "./http/index.ts";

/**
 * Who may look inside and steer by hand: explanations, previews, busy thresholds, naming a worker. With an admin key
 * (`--admin-key`) whoever sends it, as `x-dynamo-admin-key` or as a bearer token; without one, clients on this machine.
 * A request that came through a proxy on this machine is not from this machine.
 */
export class Operators {
  readonly #keyDigest: Buffer | undefined;

  constructor(adminKey: string | undefined) {
    this.#keyDigest = adminKey === undefined ? undefined : digest(adminKey);
  }

  includes(exchange: Exchange): boolean {
    if (this.#keyDigest === undefined) return isLocal(exchange);
    const given =
      exchange.header("x-dynamo-admin-key") ?? /^Bearer (.+)$/i.exec(exchange.header("authorization") ?? "")?.[1];
    return given !== undefined && timingSafeEqual(digest(given), this.#keyDigest);
  }

  /** Others learn nothing: for them there is no such route. Throws `route-not-found`. */
  check(exchange: Exchange): void {
    if (this.includes(exchange)) return;
    throw new DynamoError("route-not-found", `${exchange.method} ${exchange.path} is not served`, {
      diagnostic: "the caller is not an operator",
    });
  }
}

/** Equal lengths for the comparison, whatever the key's. */
function digest(text: string): Buffer {
  return createHash("sha256").update(text).digest();
}

const PROXY_HEADERS = ["forwarded", "x-forwarded-for", "x-real-ip", "via"];

function isLocal(exchange: Exchange): boolean {
  const address = exchange.remoteAddress.replace(/^::ffff:/, "");
  if (address !== "::1" && !address.startsWith("127.")) return false;
  return PROXY_HEADERS.every((name) => exchange.header(name) === undefined);
}
