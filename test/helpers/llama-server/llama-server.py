"""llama.cpp's own HTTP server, out of the xllamacpp wheel, under the flags of llama-server that tests need."""

import argparse
import os
import signal

import xllamacpp


def main() -> None:
    flags = argparse.ArgumentParser(allow_abbrev=False)
    flags.add_argument("-m", "--model", required=True)
    flags.add_argument("-a", "--alias")
    flags.add_argument("--host", default="127.0.0.1")
    flags.add_argument("--port", type=int, default=8080)
    flags.add_argument("-c", "--ctx-size", type=int, default=0)
    flags.add_argument("-np", "--parallel", type=int, default=4)
    flags.add_argument("-b", "--batch-size", type=int, default=2048)
    flags.add_argument("-t", "--threads", type=int, default=1)
    flags.add_argument("--api-key", default=os.environ.get("LLAMA_API_KEY"))
    flags.add_argument("--slot-save-path")
    flags.add_argument("--cache-ram", type=int, default=8192)
    flags.add_argument("--metrics", action="store_true")
    flags.add_argument("--no-slots", action="store_true")
    given = flags.parse_args()

    params = xllamacpp.CommonParams()
    params.model.path = given.model
    params.hostnames = [given.host]
    params.port = given.port
    params.n_ctx = given.ctx_size
    params.n_parallel = given.parallel
    params.n_batch = given.batch_size
    params.n_gpu_layers = 0
    params.cache_ram_mib = given.cache_ram
    params.cpuparams.n_threads = given.threads
    params.cpuparams_batch.n_threads = given.threads
    params.endpoint_metrics = given.metrics
    params.endpoint_slots = not given.no_slots
    params.endpoint_props = True
    params.kv_unified = False
    params.ui = False
    if given.alias:
        params.model_alias = {given.alias}
    if given.api_key:
        params.api_keys = [given.api_key]
    if given.slot_save_path:
        params.slot_save_path = os.path.join(given.slot_save_path, "")

    # Before its threads are there, which inherit it: a signal is to come to nobody but the wait below.
    ending = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ending)
    server = xllamacpp.Server(params)
    print(f"server is listening on {server.listening_address}", flush=True)
    signal.sigwait(ending)
    # Its threads may be in the middle of a request: nobody waits for them.
    os._exit(0)


main()
