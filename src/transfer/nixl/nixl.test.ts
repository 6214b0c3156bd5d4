import { TransferAgent } from "../index.ts";
import { openPeers, transferBattery } from "../transfer.battery.ts";
const libraryFolder = "/tmp/nixl-try/site/.nixl_cu12.mesonpy.libs";
transferBattery({
  backend: "nixl",
  hasPeer: true,
  ownerChecks: false,
  anyRange: true,
  open: (options) => openPeers(options, (name, clock) => TransferAgent.start({ name, clock, shm: false, tcp: false, nixl: { libraryFolder } }), true),
});
import { processBattery } from "../process.battery.ts";
processBattery({ backend: "nixl", agent: { shm: false, tcp: false, nixl: { libraryFolder } }, needsLivePeer: true });
