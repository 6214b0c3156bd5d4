import { createServer } from "node:net";
import { DynamoError } from "../errors/index.ts";

/** Finds out whether an address can be listened on. Throws `address-in-use` with one line that names the flag to change. */
export async function checkPortFree(host: string, port: number): Promise<void> {
  if (port === 0) return;
  const server = createServer();
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  server.once("error", reject);
  server.listen({ host, port, exclusive: true }, resolve);
  try {
    await promise;
  } catch (error) {
    throw portError(error, host, port);
  }
  const closed = Promise.withResolvers<void>();
  server.close(() => closed.resolve());
  await closed.promise;
}

function portError(error: unknown, host: string, port: number): DynamoError {
  switch ((error as { code?: unknown }).code) {
    case "EADDRINUSE":
      return new DynamoError("address-in-use", `port ${port} on ${host} is in use; choose another with --http-port`, {
        cause: error,
      });
    case "EACCES":
      return new DynamoError(
        "address-in-use",
        `port ${port} on ${host} needs privileges; choose one above 1023 with --http-port`,
      );
    case "EADDRNOTAVAIL":
    case "ENOTFOUND":
      return new DynamoError("invalid-config", `--http-host: ${host} is not an address of this machine`);
    default:
      return new DynamoError("address-in-use", `cannot listen on ${host}:${port}: ${(error as Error).message}`);
  }
}
