export { startFrontendThreads, type FrontendThreadsOptions } from "./host.ts";
export { serveFrontendThread, type ThreadSeat } from "./serve-thread.ts";
