import type { KvEvent, KvStored, StorageTier } from "../../protocol/index.ts";
import { LINK_LOCAL_HI, LINK_LOCAL_LO, LINK_PARENT, LINK_WORDS } from "./flat-kv-index.ts";
