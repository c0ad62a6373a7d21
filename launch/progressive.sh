#!/usr/bin/env bash
# Progressive teachers on a laptop's CPU or on GPUs: the quickstart's teacher with its checkpoints, a cache from three of
# them, and students that differ in their targets alone, three seeds each: the text (ce), the last checkpoint's cache
# (kd), caches of earlier checkpoints first (pro_kd), the last checkpoint in the job (full_kd), the same at temperatures
# that fall and then the text (annealing_kd). Held-out figures, mean and deviation over the seeds.
#
#   launch/progressive.sh                            everything (a teacher of 800 steps, 15 students of 150)
#   launch/progressive.sh --short                    the same path with few steps (a smoke test; figures mean nothing)
#   launch/progressive.sh corpus.paths='[my/text]'   on your own text (.py, .txt, .md, .jsonl)
#   RUN=runs/mine launch/progressive.sh ...          in another folder (default runs/progressive)
#   VENV=none launch/progressive.sh ...              with the python and torchrun on PATH
#
# Running it again goes on where it stopped and skips what is done.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${VENV:-}" = none ] || source launch/env.sh hf eval

RUN=${RUN:-runs/progressive}
source launch/jobs.sh
parse_arguments "$@"
RECIPES=launch/recipes

teacher_steps=800 seeds=(1 2 3) most_sequences=3840 teacher=() capture=() student=() short_phases=()
evaluation=(eval.num_sequences=128)
if [ -n "$short" ]; then
    teacher_steps=8 seeds=(1) most_sequences=96
    teacher=(optimizer.warmup_steps=1 model.num_layers=1 model.hidden_size=32 model.ffn_hidden_size=64)
    capture=(capture.sanity_gate=warn)
    student=(data.canary=warn train.steps=6 optimizer.wsd_decay_steps=2 optimizer.warmup_steps=1 model.hidden_size=32 model.ffn_hidden_size=64)
    short_phases=(2)
    evaluation=(eval.num_sequences=16)
fi

# The phases of a recipe, with the caches of this run, and of so many steps each where $2 says so.
phases() {
    python -c 'import json, sys, yaml
phases = yaml.safe_load(open(sys.argv[1]))["phases"]
for phase in phases:
    if "cache" in phase.get("data", {}):
        phase["data"]["cache"] = phase["data"]["cache"].replace("runs/progressive", sys.argv[2], 1)
    if sys.argv[3:]:
        phase["train"] = {"steps": int(sys.argv[3])}
print("phases=" + json.dumps(phases))' "$1" "$RUN" "${@:2}"
}

log "tokenize"
tokenize_corpus "$most_sequences"
log "train the teacher ($NPROC processes, data parallel)"
together train $RECIPES/quickstart/teacher.yaml "${tokens[@]}" "train.output_dir=$RUN/teacher" \
    "train.steps=$teacher_steps" "train.checkpoint_interval=$((teacher_steps / 4))" train.keep_checkpoints=4 "${teacher[@]}"
for checkpoint in "early $((teacher_steps / 4))" "middle $((teacher_steps / 2))" "late $teacher_steps"; do
    read -r name step <<<"$checkpoint"
    log "capture the teacher as it was at step $step ($NPROC processes)"
    together capture $RECIPES/quickstart/capture.yaml "${data[@]}" "capture.output_dir=$RUN/cache/$name" \
        "teacher.path=$(printf '%s/teacher/checkpoints/step-%08d' "$RUN" "$step")" "${capture[@]}"
done

models=""
train() { # name, recipe, options
    local folder="$RUN/students/$1/seed-$seed"
    log "student $1, seed $seed ($NPROC processes)"
    together train "$RECIPES/progressive/$2.yaml" "${data[@]}" "${student[@]}" "train.seed=$seed" \
        "train.output_dir=$folder" "${@:3}"
    models+="'$1, seed $seed': $folder, "
}
pro_kd=$(phases $RECIPES/progressive/pro_kd.yaml "${short_phases[@]}")
annealing_kd=$(phases $RECIPES/progressive/annealing_kd.yaml "${short_phases[@]}")
for seed in "${seeds[@]}"; do
    train ce student data.cache=null objective.ce_weight=1 objective.kd_weight=0
    train kd student "data.cache=$RUN/cache/late"
    train pro_kd pro_kd "data.cache=$RUN/cache/late" "$pro_kd"
    train full_kd student data.cache=null objective.target=teacher "teacher.path=$RUN/teacher"
    train annealing_kd annealing_kd "teacher.path=$RUN/teacher" "$annealing_kd"
done
log "evaluate on held-out text ($NPROC processes)"
together eval $RECIPES/quickstart/report.yaml "${data[@]}" "teacher.path=$RUN/teacher" "eval.models={${models%, }}" \
    "eval.output=$RUN/eval.json" "${evaluation[@]}"
log "mean and deviation over the seeds, and differences from kd"
python tools/seeds_table.py "$RUN/eval.json" --against kd | tee "$RUN/table.md"
log "done: $RUN/table.md"
