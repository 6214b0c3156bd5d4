import { processBattery } from "../process.battery.ts";
import { TransferAgent } from "../index.ts";
import { openPeers, transferBattery } from "../transfer.battery.ts";

transferBattery({
  backend: "tcp",
  hasPeer: true,
  ownerChecks: true,
  anyRange: true,
  recallsWrites: true,
  open: (options) => openPeers(options, (name, clock) => TransferAgent.start({ name, clock, shm: false }), false),
});

processBattery({ backend: "tcp", agent: { shm: false }, needsLivePeer: true });
