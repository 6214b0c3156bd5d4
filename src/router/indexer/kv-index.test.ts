import { SeededRandom } from "../../std/index.ts";
import { FlatKvIndex } from "./flat-kv-index.ts";
import { kvIndexBattery } from "./kv-index.battery.ts";
import { NaiveKvIndex } from "./naive-kv-index.ts";

kvIndexBattery("flat KV index", () => new FlatKvIndex({ random: new SeededRandom(1) }));
kvIndexBattery("naive KV index", () => new NaiveKvIndex());
