import { MemoryNetwork, TransferAgent, type MemoryLink } from "./index.ts";
import { openPeers, transferBattery } from "./transfer.battery.ts";

/** Everything takes three turns of the loop. */
const slowLink: MemoryLink = {
  carry: ({ onArrived }) => {
    let turns = 3;
    const turn = (): void => {
      if (turns === 0) onArrived();
      else if (turns-- > 0) setImmediate(turn);
    };
    setImmediate(turn);
    return { cancel: () => (turns = -1) };
  },
};

for (const link of [undefined, slowLink]) {
  transferBattery({
    backend: "memory",
    ...(link === undefined ? {} : { variant: "over a link" }),
    hasPeer: true,
    ownerChecks: true,
    anyRange: true,
    recallsWrites: true,
    open: (options) => {
      const memory = new MemoryNetwork(link === undefined ? {} : { link });
      return openPeers(
        options,
        (name, clock) => TransferAgent.start({ name, clock, memory, tcp: false, shm: false }),
        false,
      );
    },
  });
}
