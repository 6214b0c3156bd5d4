import { TransferAgent } from "../index.ts";
import { openPeers, transferBattery } from "../transfer.battery.ts";

transferBattery({
  backend: "tcp",
  hasPeer: true,
  anyRange: true,
  open: (options) => openPeers(options, (name, clock) => TransferAgent.start({ name, clock, shm: false }), false),
});
