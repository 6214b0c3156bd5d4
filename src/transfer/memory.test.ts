import { MemoryNetwork, TransferAgent } from "./index.ts";
import { openPeers, transferBattery } from "./transfer.battery.ts";

transferBattery({
  backend: "memory",
  hasPeer: true,
  ownerChecks: true,
  anyRange: true,
  recallsWrites: true,
  open: (options) => {
    const memory = new MemoryNetwork();
    return openPeers(
      options,
      (name, clock) => TransferAgent.start({ name, clock, memory, tcp: false, shm: false }),
      false,
    );
  },
});
