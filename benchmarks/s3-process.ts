import { fork } from "node:child_process";
import { once } from "node:events";
import { rm } from "node:fs/promises";
import { startS3Server, type S3Server } from "../src/transfer/s3/fixtures/s3-server.ts";

/** The tests' S3 server in a process of its own, so that its CPU is not that of who measures. */
export async function startS3Process(): Promise<S3Server> {
  const child = fork(import.meta.filename, { stdio: ["ignore", "ignore", "inherit", "ipc"] });
  const [{ options, directory }] = (await once(child, "message")) as [Pick<S3Server, "options" | "directory">];
  return {
    options,
    directory,
    close: async () => {
      const exited = once(child, "exit");
      child.disconnect();
      await exited;
      await rm(directory, { recursive: true, force: true });
    },
  };
}

if (import.meta.main) {
  const server = await startS3Server();
  process.on("disconnect", () => void server.close().finally(() => process.exit(0)));
  process.send!({ options: server.options, directory: server.directory });
}
