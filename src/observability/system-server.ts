import { createServer, type ServerResponse } from "node:http";
import { DynamoError } from "../errors/index.ts";
import type { Metrics } from "./metrics.ts";

export interface SystemServer {
  readonly port: number;
  close(): Promise<void>;
}

export interface SystemServerOptions {
  readonly port: number;
  readonly metrics: Metrics;
  /** `ready` answers 200 on /health, anything else 503. */
  /** Appended to /metrics: of an engine that is a process of its own. */
  readonly foreignMetrics?: () => string;
  /** The newest lines of an engine's log that hold a text: `/engine/log?search=TEXT&lines=N`. */
  readonly searchLog?: (text: string, limit: number) => readonly string[];
  readonly status: () => { readonly state: string; readonly [key: string]: unknown };
}

const MAX_LOG_LINES = 4_000;

/** `/health`, `/live` and `/metrics` of a role that has no HTTP front of its own. Loopback only: it has no keys. */
export async function startSystemServer(options: SystemServerOptions): Promise<SystemServer> {
  const json = (response: ServerResponse, status: number, value: unknown): void => {
    response.writeHead(status, { "content-type": "application/json" }).end(`${JSON.stringify(value)}\n`);
  };
  const server = createServer({ headersTimeout: 10_000, requestTimeout: 10_000 }, (request, response) => {
    const [path, query = ""] = (request.url ?? "/").split("?", 2) as [string, string?];
    if (request.method !== "GET") json(response, 405, { error: "only GET" });
    else if (path === "/live") json(response, 200, { status: "live" });
    else if (path === "/health") {
      const status = options.status();
      json(response, status.state === "ready" ? 200 : 503, {
        status: status.state === "ready" ? "ready" : "notready",
        ...status,
      });
    } else if (path === "/metrics") {
      void options.metrics.render().then(
        (text) =>
          response
            .writeHead(200, { "content-type": "text/plain; version=0.0.4; charset=utf-8" })
            .end(text + (options.foreignMetrics?.() ?? "")),
        (error: unknown) => json(response, 500, { error: String(error) }),
      );
    } else if (path === "/engine/log" && options.searchLog !== undefined) {
      const wanted = new URLSearchParams(query);
      const lines = Math.min(MAX_LOG_LINES, Math.max(1, Number(wanted.get("lines") ?? 100) || 100));
      const found = options.searchLog(wanted.get("search") ?? "", lines);
      response.writeHead(200, { "content-type": "text/plain; charset=utf-8" }).end(`${found.join("\n")}\n`);
    } else json(response, 404, { error: "not found", paths: ["/health", "/live", "/metrics"] });
  });
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  server.once("error", (cause) => {
    reject(
      new DynamoError(
        "address-in-use",
        `the status port ${options.port} cannot be opened; choose another with --system-port`,
        { cause },
      ),
    );
  });
  server.listen(options.port, "127.0.0.1", resolve);
  await promise;
  const address = server.address();
  return {
    port: typeof address === "object" && address !== null ? address.port : options.port,
    close: async () => {
      const closed = Promise.withResolvers<void>();
      server.close(() => closed.resolve());
      server.closeAllConnections();
      await closed.promise;
    },
  };
}
