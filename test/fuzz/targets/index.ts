import type { AnyTarget } from "../fuzzer.ts";
import { FILE_TARGETS } from "./files.ts";
import { SOCKET_TARGETS } from "./sockets.ts";
import { TEXT_TARGETS } from "./text.ts";
import { WIRE_TARGETS } from "./wire.ts";

/** Everything that reads bytes from outside, by name. Making one opens what it needs; `close` ends that. */
export const TARGETS: Readonly<Record<string, () => AnyTarget | Promise<AnyTarget>>> = {
  ...WIRE_TARGETS,
  ...FILE_TARGETS,
  ...TEXT_TARGETS,
  ...SOCKET_TARGETS,
};
