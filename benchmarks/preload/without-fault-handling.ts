import { AdmissionGate } from "../../src/frontend/admission.ts";
import { LiveRequest, LiveRequests, type LiveRequestDetails } from "../../src/frontend/live-requests.ts";
import { ProgressWatch, WorkerProgress } from "../../src/frontend/progress-watch.ts";
import { Heartbeat } from "../../src/runtime/request-plane/heartbeat.ts";
import { TimerWheel, systemClock } from "../../src/std/index.ts";

/**
 * Loaded before `dynamo` (NODE_OPTIONS=--import) by the fault-overhead benchmark: takes out of the same build what no
 * flag switches off, by putting functions that do nothing in the place of those of deadlines and stage limits, the gate,
 * the list of live requests, the progress watch and the heartbeats. Never used by anything that serves.
 */
const nothing = (): undefined => undefined;

TimerWheel.prototype.add = nothing;
TimerWheel.prototype.cancel = nothing;

Heartbeat.prototype.add = nothing;
Heartbeat.prototype.delete = nothing;

AdmissionGate.prototype.tryEnter = () => true;
AdmissionGate.prototype.release = nothing;

LiveRequests.prototype.enter = function (details: LiveRequestDetails): LiveRequest {
  const request = new LiveRequest(this, details);
  request.admittedMs = systemClock.monotonicMs();
  return request;
};
LiveRequests.prototype.start = (request, run) => {
  request.run = run;
};
LiveRequests.prototype.left = nothing;

const PROGRESS = new WorkerProgress();
ProgressWatch.prototype.enter = () => PROGRESS;
ProgressWatch.prototype.leave = nothing;
