import { testSeeds } from "./standard-seeds.ts";

testSeeds(501, 1_000);
