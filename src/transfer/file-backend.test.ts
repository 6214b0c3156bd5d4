import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { systemClock } from "../std/index.ts";
import { TransferAgent, type RegisterOptions } from "./index.ts";
import { transferBattery, type OpenOptions, type Pair } from "./transfer.battery.ts";

async function open(options: OpenOptions, direct: boolean): Promise<Pair> {
  const folder = await mkdtemp(join(tmpdir(), "dynamo-transfer-"));
  const path = join(folder, "slab");
  const byteLength = options.blockBytes * options.blockCount;
  const agent = await TransferAgent.start({ name: "initiator", clock: options.clock ?? systemClock, tcp: false });
  const local = await agent.allocate(byteLength);
  const register: RegisterOptions = options.remote ?? {};
  const remoteRegion = await agent.register({ kind: "file", path, byteLength, direct }, register);
  return {
    agent,
    owner: agent,
    peer: agent.self,
    local,
    remote: remoteRegion,
    remoteRegion,
    fillRemote: (bytes) => writeFile(path, bytes, { flag: "r+" }),
    readRemote: () => readFile(path),
    close: async () => {
      await agent.close();
      await rm(folder, { recursive: true });
    },
  };
}

transferBattery({ backend: "file", hasPeer: false, ownerChecks: true, anyRange: true, open: (options) => open(options, false) });
