#!/usr/bin/env bash
# From nothing to a distilled student and a report, on a laptop's CPU or on GPUs, in one command.
#
#   launch/quickstart.sh                            the whole comparison (under 15 minutes on 2 cores)
#   launch/quickstart.sh --short                    the same path with few steps (a smoke test; figures mean nothing)
#   launch/quickstart.sh corpus.paths='[my/text]'   on your own text (.py, .txt, .md, .jsonl)
#   RUN=runs/mine launch/quickstart.sh ...          in another folder (default runs/quickstart)
#   VENV=none launch/quickstart.sh ...              with the python and torchrun on PATH, as in the container
#
# Running it again goes on where it stopped and skips what is done.
set -euo pipefail
cd "$(dirname "$0")/.."
[ "${VENV:-}" = none ] || source launch/env.sh hf eval

RUN=${RUN:-runs/quickstart}
source launch/jobs.sh
parse_arguments "$@"
RECIPES=launch/recipes/quickstart

teacher=() student=() evaluation=() most_sequences=6144
if [ -n "$short" ]; then
    most_sequences=128
    teacher=(train.steps=60 optimizer.warmup_steps=5 model.num_layers=2 model.hidden_size=64 model.ffn_hidden_size=160)
    student=(train.steps=20 model.hidden_size=64 model.ffn_hidden_size=160)
    evaluation=(eval.num_sequences=32)
fi

log "tokenize"
tokenize_corpus "$most_sequences"
log "train the teacher ($NPROC processes, data parallel)"
together train $RECIPES/teacher.yaml "${tokens[@]}" "${teacher[@]}" "train.output_dir=$RUN/teacher"
log "capture the teacher's distribution ($NPROC processes)"
together capture $RECIPES/capture.yaml "${data[@]}" "teacher.path=$RUN/teacher" "capture.output_dir=$RUN/cache"
log "verify the cache"
alone verify $RECIPES/student_kd.yaml "${data[@]}" "data.cache=$RUN/cache"
log "train the baseline student on the text ($NPROC processes, tensor parallel)"
together train $RECIPES/student_ce.yaml "${data[@]}" "${student[@]}" "parallel.tensor=$NPROC" \
    "train.output_dir=$RUN/student_ce"
log "train the same student from the cache ($NPROC processes, tensor parallel)"
together train $RECIPES/student_kd.yaml "${data[@]}" "${student[@]}" "parallel.tensor=$NPROC" \
    "train.output_dir=$RUN/student_kd" "data.cache=$RUN/cache"
models="{teacher: $RUN/teacher, 'student, CE': $RUN/student_ce, 'student, KD': $RUN/student_kd}"
log "evaluate on held-out text ($NPROC processes)"
together eval $RECIPES/report.yaml "${data[@]}" "${evaluation[@]}" "teacher.path=$RUN/teacher" \
    "eval.models=$models" "eval.output=$RUN/eval.json"
log "report"
alone report $RECIPES/report.yaml "report.runs=$models" "report.eval=$RUN/eval.json" "report.output_dir=$RUN/report"
log "export the distilled student for transformers"
alone export "$RUN/student_kd" "$RUN/exported"
log "done"
