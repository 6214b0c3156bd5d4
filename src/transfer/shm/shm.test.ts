import { processBattery } from "../process.battery.ts";
import { TransferAgent } from "../index.ts";
import { openPeers, transferBattery } from "../transfer.battery.ts";

transferBattery({
  backend: "shm",
  hasPeer: true,
  ownerChecks: true,
  anyRange: true,
  recallsWrites: true,
  open: (options) =>
    openPeers(options, (name, clock) => TransferAgent.start({ name, clock, shm: {}, tcp: false }), true),
});

processBattery({ backend: "shm", agent: { tcp: false, shm: {} }, needsLivePeer: false });
