# shellcheck shell=bash
# Sourced by train.sbatch for a job of two components: training nodes, and CPU-only nodes that sample.
#
#   start_ray NODES   starts one Ray over all of them, with so many training nodes; ends with the job
#   $ray_address      where it is
#   $ray_cpus         CPUs of the sampling nodes

start_ray() {
    local training="$1" sampling="$SLURM_JOB_NUM_NODES_HET_GROUP_1"
    local per_node="${SLURM_CPUS_PER_TASK_HET_GROUP_1:-1}"
    local port=$((25000 + SLURM_JOB_ID % 7000)) # below are Lightning's, above what the system gives out
    ray_cpus=$((sampling * per_node))
    ray_address="$(scontrol show hostnames "$SLURM_JOB_NODELIST_HET_GROUP_0" | head -n 1):$port"

    # Only this job's processes know the token; its environment is nobody else's to read.
    RAY_AUTH_TOKEN="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')"
    export RAY_AUTH_TOKEN RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0

    # Fixed ports would clash with those of another job on the node. Slurm sends USR1 to these processes too,
    # which would end them. On SIGTERM they stay until nobody uses them, 30 s at most: the trainer saves first.
    local ray='trap "" USR1
        ports=(--min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0)
        if [[ $SLURM_PROCID == 0 && $1 == 0 ]]; then
            exec ray start --block --head --port="${0##*:}" --num-cpus=0 --num-gpus=0 \
                --include-dashboard=false "${ports[@]}"
        fi
        until (exec 3<>"/dev/tcp/${0%:*}/${0##*:}") 2>/dev/null; do sleep 0.5; done
        exec ray start --block --address="$0" --num-cpus="$1" --num-gpus=0 "${ports[@]}"'
    srun --overlap --het-group=0 --nodes="$training" --ntasks-per-node=1 --ntasks="$training" \
        bash -c "$ray" "$ray_address" 0 >/dev/null &
    srun --overlap --het-group=1 --nodes="$sampling" --ntasks-per-node=1 --ntasks="$sampling" \
        --cpus-per-task="$per_node" bash -c "$ray" "$ray_address" "$per_node" >/dev/null &

    # The trainer counts the CPUs when it starts.
    python - "$ray_address" $((training + sampling)) <<'PYTHON'
import socket, sys, time
import ray
host, _, port = sys.argv[1].rpartition(":")
deadline = time.monotonic() + 180
def late(what):
    return time.monotonic() > deadline and sys.exit(f"no Ray at {sys.argv[1]} within 180 s: {what}")
while True:
    try:
        socket.create_connection((host, int(port)), 5).close()
        break
    except OSError as error:
        late(error)
        time.sleep(0.2)
time.sleep(1)
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
while (alive := sum(node["Alive"] for node in ray.nodes())) < int(sys.argv[2]):
    late(f"{alive} of {sys.argv[2]} nodes")
    time.sleep(0.2)
PYTHON
}
